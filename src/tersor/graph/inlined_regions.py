"""Regions of `forward` under `torch.no_grad()` or `torch.autocast`: torch.export records each as a graph of its own.

Their operators are moved into the graph of the network, so that layers inside can be pruned, quantized and trained.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, cast

import torch
from torch import fx

from tersor.core.errors import InputError
from tersor.graph.aten import operator_name

_GRADIENTS, _AUTOCAST = "wrap_with_set_grad_enabled", "wrap_with_autocast"
_ARGUMENTS = {_GRADIENTS: 1, _AUTOCAST: 4}
"""Operator -> the number of arguments before the region's graph."""


def inline_regions(graph: fx.GraphModule) -> None:
    """Move the operators of every region into `graph`, in place. What a region without gradients returns is detached.

    Raises:
        InputError: a region turns autocast on.
    """
    while regions := [node for node in graph.graph.nodes if operator_name(node) in _ARGUMENTS]:
        for node in regions:
            _inline(graph, node)


def _inline(graph: fx.GraphModule, node: fx.Node) -> None:
    name = operator_name(node)
    before = _ARGUMENTS[name]
    if name == _AUTOCAST and node.args[2]:
        raise InputError(
            "the forward method turns autocast on, which a captured graph does not support. Remove torch.autocast from "
            "it. In training, a stage's `precision` sets autocast for the whole network."
        )
    region_read = cast("fx.Node", node.args[before])
    region: fx.GraphModule = attrgetter(str(region_read.target))(graph)
    inputs = iter(node.args[before + 1 :])
    *operators, output = region.graph.nodes
    copies: dict[fx.Node, Any] = {}
    with graph.graph.inserting_before(node):
        for each in operators:
            if each.op == "placeholder":
                copies[each] = next(inputs)
                continue
            copies[each] = graph.graph.node_copy(each, copies.__getitem__)
            if each.op == "get_attr":
                _adopt(graph, region, str(each.target), copies[each])
        results: list[Any] = list(cast("tuple[Any, ...]", fx.map_arg(output.args[0], copies.__getitem__)))
        if name == _GRADIENTS and not node.args[0]:
            results = [_detached(graph, each) for each in results]
    for user in list(node.users):  # each takes one of the results
        user.replace_all_uses_with(results[cast("int", user.args[1])])
        graph.graph.erase_node(user)
    graph.graph.erase_node(node)
    if not region_read.users:
        graph.graph.erase_node(region_read)


def _adopt(graph: fx.GraphModule, region: fx.GraphModule, path: str, read: fx.Node) -> None:
    """Register what the region reads by itself (a constant, a region within) under a new name in `graph`."""
    name = f"of_region_{read.name}"
    setattr(graph, name, attrgetter(path)(region))
    read.target = name


def _detached(graph: fx.GraphModule, value: Any) -> Any:
    if not isinstance(value, fx.Node):
        return value
    detached = graph.graph.call_function(torch.ops.aten.detach.default, (value,))
    detached.meta = {"val": value.meta["val"]}  # in no module
    return detached
