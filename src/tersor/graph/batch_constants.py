"""Networks whose Python code turns the batch size into a number: `len(x)`, `int(x.shape[0])`.

torch.export records that number as a constant. So the network is recorded twice, with two batch sizes. A constant with
the value `a` in one graph and `b` in the other is `factor * batch + offset`; nodes that compute this replace it. The
captured graph is then compared with the network on further batch sizes (`capture`), as every captured graph is.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext, is_concrete_int
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_flatten, tree_unflatten

from tersor.graph.aten import operator_name


def compute_batch_sizes(graph: fx.GraphModule, other: fx.GraphModule, inputs: Sequence[Tensor], size: int) -> bool:
    """Replace the constants of `graph` that depend on the batch size, in place.

    Args:
        graph: recorded on `inputs`.
        other: the same network, recorded on a batch of `size`.
        inputs: the input tensors of the network (N, ...).
        size: a batch size other than N.

    Returns:
        Whether `graph` accepts any batch size now: the two differ in nothing but such constants.
    """
    nodes, others = list(graph.graph.nodes), list(other.graph.nodes)
    if [_kind(node) for node in nodes] != [_kind(node) for node in others]:
        return False
    placeholders = [node for node in nodes if node.op == "placeholder"]
    with graph.graph.inserting_after(placeholders[-1]):
        batch = graph.graph.call_function(torch.ops.aten.sym_size.int, (placeholders[0], 0))
    sizes = len(inputs[0]), size
    partner = dict(zip(others, nodes, strict=True))
    for node, twin in zip(nodes, others, strict=True):
        if node.op == "get_attr" and not _same_shape(graph, other, node, twin):
            return False
        arguments = _merged(node, (twin.args, twin.kwargs), partner, batch, sizes)
        if arguments is None:
            return False
        node.args, node.kwargs = arguments
    return _with_shapes(graph, inputs, placeholders)


def _kind(node: fx.Node) -> tuple[str, str]:
    """What a node calls; the names of subgraphs and constants are numbered alike in both graphs."""
    return node.op, operator_name(node) or str(node.target)


def _same_shape(graph: fx.GraphModule, other: fx.GraphModule, node: fx.Node, twin: fx.Node) -> bool:
    values = [operator.attrgetter(str(each.target))(owner) for each, owner in ((node, graph), (twin, other))]
    return not isinstance(values[0], Tensor) or values[0].shape == values[1].shape


def _merged(
    node: fx.Node, given: Any, partner: dict[fx.Node, fx.Node], batch: fx.Node, sizes: tuple[int, int]
) -> Any | None:
    """The arguments of `node`, with nodes in place of the integers that differ from those of its twin."""
    leaves, spec = tree_flatten((node.args, node.kwargs))
    twins, twin_spec = tree_flatten(given)
    if spec != twin_spec:
        return None
    for place, (leaf, twin) in enumerate(zip(leaves, twins, strict=True)):
        if isinstance(leaf, fx.Node):
            if partner.get(twin) is not leaf:
                return None
        elif isinstance(twin, fx.Node):  # a number in one recording, because it equals another number there
            if twin not in partner or not isinstance(leaf, int):
                return None
            leaves[place] = partner[twin]
        elif leaf != twin:
            if not (type(leaf) is type(twin) is int):
                return None
            factor, rest = divmod(twin - leaf, sizes[1] - sizes[0])
            if rest:
                return None
            leaves[place] = _affine(node, batch, factor, leaf - factor * sizes[0])
    return tree_unflatten(leaves, spec)


def _affine(before: fx.Node, batch: fx.Node, factor: int, offset: int) -> fx.Node:
    """factor * batch + offset."""
    with before.graph.inserting_before(before):
        value = batch if factor == 1 else before.graph.call_function(operator.mul, (batch, factor))
        return before.graph.call_function(operator.add, (value, offset)) if offset else value


def _with_shapes(graph: fx.GraphModule, inputs: Sequence[Tensor], placeholders: Sequence[fx.Node]) -> bool:
    """Compute the shape of every node for a batch of unknown size; returns whether it stays unknown."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    values = [
        mode.from_tensor(
            each,
            symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (each.ndim - 1)]),
        )
        for each in inputs
    ]
    try:
        with enable_python_dispatcher():  # kernels in C++ for padding and resizing take numbers alone
            FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*values)
    except (RuntimeError, IndexError, TypeError, ValueError):  # an operator that does not run on another batch size
        return False
    return not any(is_concrete_int(node.meta["val"].shape[0]) for node in placeholders)
