"""The operators of an exported graph, rewritten in the few forms that other modules handle."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from tersor.graph.aten import arguments, operator_name

_CONVERSIONS = {"to", "type_as"}


def use_common_operators(graph: fx.Graph) -> None:
    """Remove what does nothing, write sizes of reshapes that depend on the batch as -1, and replace rare operators."""
    for node in graph.nodes:
        _use_common_operator(node)
        name, value = operator_name(node), node.meta.get("val")
        if name in _CONVERSIONS and isinstance(value, Tensor) and not arguments(node).get("copy"):
            before = node.args[0].meta["val"]
            if (value.dtype, value.device) == (before.dtype, before.device):
                node.replace_all_uses_with(node.args[0])
        elif name == "silu" or (name == "silu_" and _is_only_reader(node)):
            _divide_silu(node)
        elif name == "slice" and _takes_all(arguments(node)):
            node.replace_all_uses_with(node.args[0])
        elif name in ("view", "reshape") and "dtype" not in arguments(
            node
        ):  # a view fails where autocast or training changes the memory layout
            node.target = torch.ops.aten.reshape.default
            sizes = list(node.args[1])
            if -1 not in sizes and sum(isinstance(size, fx.Node) for size in sizes) == 1:
                node.args = (node.args[0], [-1 if isinstance(size, fx.Node) else size for size in sizes])


def _use_common_operator(node: fx.Node) -> None:
    """`x.mT`, `x.T` and `torch.mm` as the operators that other modules know."""
    name, value = operator_name(node), node.meta.get("val")
    if name == "mm":
        node.target = torch.ops.aten.matmul.default
    elif (
        isinstance(value, Tensor)
        and not value.is_complex()
        and (name == "mT" or (name == "numpy_T" and value.ndim == 2))
    ):
        node.target, node.args = torch.ops.aten.transpose.int, (node.args[0], -2, -1)


def _is_only_reader(node: fx.Node) -> bool:
    """Whether nothing but `node` reads its input, or a view of the same memory."""
    value: Any = node.args[0]
    while len(value.users) == 1 and isinstance(value.target, OpOverload) and value.target.is_view:
        value = value.args[0]
    return len(value.users) == 1 and operator_name(value) not in ("", "getitem")


def _divide_silu(node: fx.Node) -> None:
    """x sigmoid(x): ONNX Runtime has integer operators for both, and none for SiLU."""
    value = cast("fx.Node", node.args[0])
    with node.graph.inserting_before(node):
        factor = node.graph.call_function(torch.ops.aten.sigmoid.default, (value,), name="sigmoid")
        product = node.graph.call_function(torch.ops.aten.mul.Tensor, (value, factor), name="mul")
    factor.meta, product.meta = dict(node.meta), dict(node.meta)
    node.replace_all_uses_with(product)
    node.graph.erase_node(node)


def _takes_all(given: dict[str, Any]) -> bool:
    """Whether a slice is `x[:]`."""
    return given["start"] in (None, 0) and given["end"] in (None, sys.maxsize) and given["step"] == 1
