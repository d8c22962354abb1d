"""The operators of a captured graph: names and arguments of the aten operators that torch.export records."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch._ops import OpOverload


def operator_name(node: fx.Node) -> str:
    """The name of the operator without namespace and overload (`conv2d`, `add_`); "" if the node calls none."""
    if node.op != "call_function":
        return ""
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.rpartition("::")[2]  # pyright: ignore[reportPrivateUsage]
    return getattr(node.target, "__name__", str(node.target))


def called_name(node: fx.Node, module: nn.Module | None = None) -> str:
    """The name of the operator or of the module class that a node calls."""
    return operator_name(node) if module is None else type(module).__name__


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an aten operator by the names of its schema, with defaults."""
    assert isinstance(node.target, OpOverload)
    schema = node.target._schema.arguments  # pyright: ignore[reportPrivateUsage]
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given |= {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    return {**given, **node.kwargs}
