"""Values that are expanded along a dimension, written as sums or left to broadcasting, for OpenVINO.

    token.expand(n, -1, -1)        ->    token + zeros             zeros: (n, 1, 1), computed from the images
    x.new_ones(n, 2, 8, 8)         ->    x.new_ones(1, 2, 8, 8) + zeros
    queries.repeat(n, 1)           ->    (queries.unsqueeze(0) + zeros).flatten(0, 1)
    x * scale.expand_as(x)         ->    x * scale
    mean.expand(-1, -1, 8, 8)      ->    mean + zeros              zeros: (1, 1, 8, 8), a constant

The values are the same, but OpenVINO loses the bias of 8-bit layers if the graph has one of the forms on the left (see
`quantization/runtime_defects.py`). Constants are expanded to the batch size, features of the images to other sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from tersor.graph.aten import dtype_of, operator_name, shape_of
from tersor.graph.capture import is_size, values_into
from tersor.graph.dead_code import remove_unused
from tersor.graph.forward_call import input_nodes
from tersor.graph.matrix_products import OperatorAdder

_aten = torch.ops.aten
_EXPANDED = {"expand", "expand_as", "broadcast_to", "repeat_interleave"}
_REPEATED = {"repeat", "tile"}
_ELEMENTWISE = {"add", "sub", "mul", "div", "maximum", "minimum"}
_WITHOUT_INPUT = {"zeros", "ones", "full"}
_FILLED = {*_WITHOUT_INPUT, "new_zeros", "new_ones", "new_full"}


def rewrite_expansions(graph: fx.GraphModule) -> None:
    """Rewrite the operators of a captured network that expand a value, in place.

    Args:
        graph: a captured network without quantizers.
    """
    zeros = _Zeros(graph.graph)
    constants: set[fx.Node] = set()
    for node in list(graph.graph.nodes):
        values, name = values_into(node), operator_name(node)
        if name in _FILLED or (name in _EXPANDED | _REPEATED and values[0] in constants):
            total = _as_sum(node, zeros)
            if total is None:
                constants.add(node)
            else:
                node.replace_all_uses_with(total)
        elif name in _EXPANDED and name != "repeat_interleave":
            broadcast = _broadcast(node)
            if broadcast is not None:
                node.replace_all_uses_with(broadcast)
        elif node.op not in ("placeholder", "output") and constants.issuperset(values) and not is_size(node):
            constants.add(node)
    remove_unused(graph.graph)
    graph.recompile()


def _as_sum(node: fx.Node, zeros: _Zeros) -> fx.Node | None:
    """The sum that replaces an expanded constant; None if its size does not depend on the batch size."""
    batch, shape = zeros.batch_dimension(node), shape_of(node)
    if batch is None:
        return None
    fixed = _without_batch(node, batch)
    size = shape_of(fixed)[batch]
    if size == 1:
        return zeros.added_to(fixed, node, batch, shape)
    if operator_name(node) not in _REPEATED:
        return None
    add, (*before, _), after = OperatorAdder(node), shape[: batch + 1], shape[batch + 1 :]
    rows = add((*before, 1, size, *after), _aten.unsqueeze.default, fixed, batch)
    total = zeros.added_to(rows, node, batch, (*before, zeros.divided(shape[batch], size), size, *after))
    return add(shape, _aten.flatten.using_ints, total, batch, batch + 1)


def _broadcast(node: fx.Node) -> fx.Node | None:
    """What replaces expanded features of the images; None if they are expanded to the batch size."""
    value, shape = cast("fx.Node", node.args[0]), shape_of(node)
    if all(_broadcasts(user) for user in node.users):
        return value
    before = (*[1] * (len(shape) - len(shape_of(value))), *shape_of(value))
    sizes = [1 if size == old else size for size, old in zip(shape, before, strict=True)]
    if not all(isinstance(size, int) for size in sizes):
        return None
    add = OperatorAdder(node)
    zeros = add(tuple(sizes), _aten.zeros.default, sizes)
    zeros.kwargs = {"dtype": dtype_of(node)}
    return add(shape, _sum_of(node), value, zeros)


def _broadcasts(user: fx.Node) -> bool:
    """Whether an operator returns the same for a value that is not expanded."""
    return operator_name(user).rstrip("_") in _ELEMENTWISE and any(
        shape_of(value) == shape_of(user) and operator_name(value) not in _EXPANDED for value in values_into(user)
    )


def _sum_of(node: fx.Node) -> Any:
    """The operator that adds zeros to values of the data type of `node`."""
    return _aten.logical_or.default if dtype_of(node) == torch.bool else _aten.add.Tensor


def _without_batch(node: fx.Node, batch: int) -> fx.Node:
    """The constant of `node` as it is before it is expanded along `batch`."""
    name, shape, add = operator_name(node), list(shape_of(node)), OperatorAdder(node)
    value = None if name in _FILLED else cast("fx.Node", node.args[0])
    missing = 0 if value is None else len(shape) - len(shape_of(value))
    shape[batch] = 1 if value is None or batch < missing else shape_of(value)[batch - missing]
    if value is not None and name in _EXPANDED:
        return value if list(shape_of(value)) == shape else add(tuple(shape), _aten.expand.default, value, shape)
    place = 0 if name in _WITHOUT_INPUT else 1
    sizes = list(cast("Sequence[Any]", node.args[place]))
    sizes[batch - len(shape)] = 1  # tile takes fewer sizes than the output has
    fixed = add(tuple(shape), node.target, *node.args[:place], sizes, *node.args[place + 1 :])
    fixed.kwargs = node.kwargs
    return fixed


class _Zeros:
    """Zeros that are computed from the images of a graph, once for each size and data type."""

    def __init__(self, graph: fx.Graph) -> None:
        self.images = input_nodes(graph)[0]
        self.made: dict[tuple[int, torch.dtype | None], fx.Node] = {}

    def batch_dimension(self, node: fx.Node) -> int | None:
        """The only dimension of the output whose size depends on the batch size and is a multiple of it, if any."""
        found = [place for place, size in enumerate(shape_of(node)) if isinstance(size, str)]
        return found[0] if len(found) == 1 and self._multiple(shape_of(node)[found[0]]) else None

    def added_to(self, constant: fx.Node, before: fx.Node, batch: int, shape: tuple[Any, ...]) -> fx.Node:
        """constant + zeros, for an output of `shape` whose dimension `batch` depends on the batch size."""
        add, sizes = OperatorAdder(before), [1] * len(shape)
        sizes[batch] = -1
        zeros = self._of(self._multiple(shape[batch]), before)
        zeros = add((*sizes[:batch], shape[batch], *sizes[batch + 1 :]), _aten.reshape.default, zeros, sizes)
        return add(shape, _sum_of(before), constant, zeros)

    def divided(self, size: str, divisor: int) -> str:
        """The size k n / divisor."""
        return f"{self._multiple(size) // divisor}*{shape_of(self.images)[0]}".removeprefix("1*")

    def _multiple(self, size: str) -> int:
        """k for the size k n, where n is the batch size, as in windows of images; 0 for others.

        An image has at least k numbers.
        """
        factor, _, batch = size.rpartition("*")
        known = shape_of(self.images)[:1] == (batch,) and (not factor or factor.isdecimal())
        multiple = int(factor or 1) if known else 0
        return multiple if multiple <= math.prod(shape_of(self.images)[1:]) else 0

    def _of(self, multiple: int, reader: fx.Node) -> fx.Node:
        """The zeros (k n,) in the data type of `reader`."""
        dtype = dtype_of(reader)
        assert dtype is not None
        if (multiple, dtype) not in self.made:
            add = OperatorAdder(reader)  # the first reader: nodes are rewritten in their order
            batch, size = shape_of(self.images)[0], math.prod(shape_of(self.images)[1:])
            flat = add((batch, size), _aten.reshape.default, self.images, [-1, size])
            part = add((batch, multiple), _aten.slice.Tensor, flat, 1, 0, multiple)
            part = add((f"{multiple}*{batch}",), _aten.reshape.default, part, [-1])
            part = add((f"{multiple}*{batch}",), _aten.mul.Tensor, part, 0)
            if not dtype.is_floating_point:
                part = add((f"{multiple}*{batch}",), _aten.to.dtype, part, dtype)
            self.made[multiple, dtype] = part
        return self.made[multiple, dtype]
