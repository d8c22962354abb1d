"""Weights that a network computes from Parameters alone, such as standardized, concatenated or split ones.

They are constant in eval mode. A layer over such a weight gets a Parameter of its own with the computed value, and
trains as a plain layer from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from tersor.graph.dead_code import has_effects


def source_of(node: fx.Node) -> str:
    """Describe how a value is computed from Parameters; the text is equal for a weight that is computed twice."""
    if node.op != "call_function":
        return str(node.target)
    parts = fx.map_arg((node.args, node.kwargs), source_of)
    return f"{node.target}{parts}"


def computed_weight(
    node: fx.Node, reader: fx.Node, attribute: Callable[[str], Any], modules: Mapping[str, nn.Module]
) -> nn.Parameter | None:
    """A new Parameter with the value of `node`; None if it depends on the images, or on no Parameter.

    Args:
        node: a node of a graph that torch.export has recorded.
        reader: the operator that reads it.
        attribute: returns what a `get_attr` node reads.
        modules: those that the graph calls, by path.
    """
    needed = _needed(node, reader)
    if any(each.op == "placeholder" for each in needed):
        return None
    reads = [attribute(str(each.target)) for each in needed if each.op == "get_attr"]
    if not any(isinstance(each, nn.Parameter) for each in reads) and all(each.op != "call_module" for each in needed):
        return None
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for each in node.graph.nodes:
            if each in needed:
                values[each] = _value(each, values, attribute, modules)
    value = values[node]
    return nn.Parameter(value.clone()) if isinstance(value, Tensor) and value.is_floating_point() else None


def _value(
    node: fx.Node, values: dict[fx.Node, Any], attribute: Callable[[str], Any], modules: Mapping[str, nn.Module]
) -> Any:
    if node.op == "get_attr":
        value = attribute(str(node.target))
        return value.detach().clone() if isinstance(value, Tensor) else value
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    called = modules[str(node.target)] if node.op == "call_module" else cast("Callable[..., Any]", node.target)
    return called(*args, **kwargs)


def _needed(node: fx.Node, reader: fx.Node) -> set[fx.Node]:
    """Return `node`, the nodes it depends on, and those that change any of them in place before `reader`."""
    needed = _leading_to(node)
    for each in node.graph.nodes:
        if each is reader:
            break
        if has_effects(each) and not needed.isdisjoint(part for part in _leading_to(each) if part.op != "get_attr"):
            needed |= _leading_to(each)
    return needed


def _leading_to(node: fx.Node) -> set[fx.Node]:
    before, waiting = set[fx.Node](), [node]
    while waiting:
        each = waiting.pop()
        if each not in before:
            before.add(each)
            waiting += each.all_input_nodes
    return before
