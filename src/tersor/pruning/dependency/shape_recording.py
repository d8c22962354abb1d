"""One run of a captured network: the shape of every value, and what every node computed that is no tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

Recorded = dict[fx.Node, Any]
"""Node -> its value, with `Shape` in the place of tensors."""


class Shape(tuple[int, ...]):
    """Of a tensor; `torch.Size` in a graph is a value of its own."""

    __slots__ = ()


def record(graph: fx.GraphModule, example: Tensor) -> Recorded:
    """Runs `graph` on `example`; values are forgotten when their last reader has run."""
    found: Recorded = {}
    for node, value in steps(graph, example):
        found[node] = mapped(value, lambda tensor: Shape(tensor.shape))
    return found


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with `change` on every tensor in it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, tuple | list):
        found = [mapped(each, change) for each in value]
        return found if isinstance(value, list) else tuple(found)
    if isinstance(value, dict):
        return {key: mapped(each, change) for key, each in value.items()}
    return value


def steps(graph: fx.GraphModule, example: Tensor) -> Iterator[tuple[fx.Node, Any]]:
    """Every node with its value, in order."""
    last = last_readers(graph)
    values: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        values[node] = given(node, example) if node.op == "placeholder" else computed(graph, node, values)
        yield node, values[node]
        for read in last.get(node, ()):
            del values[read]


def given(node: fx.Node, example: Tensor) -> Any:
    """What a placeholder stands for: the images, or the default of another argument."""
    return node.args[0] if node.args else example


def last_readers(graph: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the values that nothing after it reads."""
    reader: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        for read in node.all_input_nodes:
            reader[read] = node
    found: dict[fx.Node, list[fx.Node]] = {}
    for read, node in reader.items():
        found.setdefault(node, []).append(read)
    return found


def computed(graph: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What `node` gives."""
    if node.op == "get_attr":
        return attribute(graph, str(node.target))
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda read: values[read])
    if node.op == "output":
        return args[0]
    if node.op == "call_module":
        return graph.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def attribute(graph: nn.Module, path: str) -> Any:
    """What lies at `path`: a parameter, a buffer, a mode."""
    found: Any = graph
    for name in path.split("."):
        found = getattr(found, name)
    return found
