"""Dead code in a graph with operators that change their input in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch._ops import OpOverload


def has_effects(node: fx.Node) -> bool:
    """Whether an operator changes one of its inputs in place."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def remove_unused(graph: fx.Graph) -> None:
    """Remove padding of width 0, and operators with unused results. An in-place change stays if its target is used.

    Swin pads by 0 on all sides if the windows fit; OpenVINO 2026.4 crashes on a quantizer after such padding.
    """
    for node in graph.nodes:
        if (
            node.target is torch.ops.aten.pad.default
            and not any(node.args[1])
            and not any(map(has_effects, node.users))
        ):
            node.replace_all_uses_with(node.args[0])
    live: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if node.op in ("placeholder", "output")]
    while waiting:
        while waiting:
            node = waiting.pop()
            if node not in live:
                live.add(node)
                waiting += node.all_input_nodes
        waiting = [node for node in graph.nodes if node not in live and has_effects(node) and _changes(node, live)]
    for node in reversed(list(graph.nodes)):
        if node not in live:
            graph.erase_node(node)


def _changes(node: fx.Node, live: set[fx.Node]) -> bool:
    """Whether an operator changes a live value, an input of the network or one of its tensors."""
    return any(each in live or each.op in ("placeholder", "get_attr") for each in _viewed(node))


def _viewed(node: fx.Node) -> Iterator[fx.Node]:
    """What an operator changes in place: its first input, and the values that this is a view of."""
    value = node.args[0]
    while isinstance(value, fx.Node):
        yield value
        is_view = isinstance(value.target, OpOverload) and (value.target.is_view or has_effects(value))
        value = value.args[0] if is_view and value.args else None
