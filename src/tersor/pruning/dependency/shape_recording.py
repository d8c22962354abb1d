"""One run of a captured network: the shape of every tensor, and every value that is not a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersor.data.network_inputs import NetworkInput
from tersor.graph.forward_call import in_order, input_nodes

Recorded = dict[fx.Node, Any]
"""Value of each node, with a `Shape` instead of each tensor."""


class Shape(tuple[int, ...]):
    """The shape of a tensor; `torch.Size` in a graph is a value of its own."""

    __slots__ = ()


def record(graph: fx.GraphModule, example: NetworkInput) -> Recorded:
    """Run `graph` on `example`; every value is freed after its last use."""
    last_uses = user_to_last_uses(graph)
    values, recorded = dict[fx.Node, Any](), Recorded()
    for node in graph.graph.nodes:
        values[node] = run_node(graph, node, values, example)
        recorded[node] = map_tensors(values[node], lambda tensor: Shape(tensor.shape))
        for read in last_uses.get(node, ()):
            del values[read]
    return recorded


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with `change` applied to every tensor in it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, tuple | list):
        changed = [map_tensors(each, change) for each in value]
        return changed if isinstance(value, list) else tuple(changed)
    if isinstance(value, dict):
        return {key: map_tensors(each, change) for key, each in value.items()}
    return value


def user_to_last_uses(graph: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the values that no later node reads."""
    last_user: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        for read in node.all_input_nodes:
            last_user[read] = node
    last_uses: dict[fx.Node, list[fx.Node]] = {}
    for read, node in last_user.items():
        last_uses.setdefault(node, []).append(read)
    return last_uses


def run_node(
    graph: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], example: NetworkInput | None = None
) -> Any:
    """The output of one node; a placeholder is that of `example`."""
    if node.op == "placeholder":
        assert example is not None
        return dict(zip(input_nodes(node.graph), in_order(node.graph, example), strict=True))[node]
    if node.op == "get_attr":
        return attribute(graph, str(node.target))
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda read: values[read])
    if node.op == "output":
        return args[0]
    if node.op == "call_module":
        return graph.get_submodule(str(node.target))(*args, **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def attribute(graph: nn.Module, path: str) -> Any:
    """The parameter, buffer or other attribute at a dotted path."""
    value: Any = graph
    for name in path.split("."):
        value = getattr(value, name)
    return value
