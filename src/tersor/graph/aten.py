"""The operators of a captured graph: names, arguments and shapes of the aten operators that torch.export records."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

SHAPE, DTYPE = "shape", "dtype"
"""Keys in a node's `meta`."""


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


def last_write(value: fx.Node) -> fx.Node | None:
    """The last node that writes into `value` or a view of it and whose result is not read, as in `value[:, 0] = x`.

    From there on, the readers of `value` see what was written.
    """
    writes: list[fx.Node] = []
    views = [value]
    while views:
        view = views.pop()
        for user in view.users:
            if not isinstance(user.target, OpOverload) or not user.args or user.args[0] is not view:
                continue
            if user.target.is_view:
                views.append(user)
            elif writes_into_input(user.target) and not user.users:
                writes.append(user)
    return max(writes, default=None)


def writes_into_input(operator: OpOverload) -> bool:
    """Whether an operator changes its first argument in place, as `copy_` does."""
    first = next(iter(operator._schema.arguments), None)  # pyright: ignore[reportPrivateUsage]
    return first is not None and first.alias_info is not None and first.alias_info.is_write


def place_of(node: fx.Node | None) -> str:
    """The path of the module in which a node of a captured graph was traced; empty if unknown."""
    stack = node.meta.get("nn_module_stack") if node is not None else None
    return list(stack.values())[-1][0] if stack else ""


def class_of_place(node: fx.Node) -> str:
    """The name of the class of the module in which a node was traced; empty if unknown."""
    stack = node.meta.get("nn_module_stack")
    kind = list(stack.values())[-1][1] if stack else ""
    return kind.__name__ if isinstance(kind, type) else kind.rpartition(".")[2]


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The sizes of a node's output when the network was captured; sizes that depend on the batch are strings."""
    return node.meta[SHAPE]


def with_shape(meta: dict[str, Any], shape: tuple[Any, ...]) -> dict[str, Any]:
    """A copy of `meta` with this output shape, for a new node in the same module."""
    return {**meta, SHAPE: shape}


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The data type of a node's output when the network was captured; None if that was no tensor."""
    return node.meta.get(DTYPE)
