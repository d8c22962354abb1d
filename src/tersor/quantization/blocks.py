"""A captured network cut where a single value carries everything: a residual block is a section, a layer in a row too.

    x -> [conv1 bn relu] -> [conv bn relu conv bn +] -> [...] -> [mean linear] -> logits

What lies between two such values can be run alone: `between` gives it as a module over the same layers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx, nn

from tersor.graph.capture import layer_of, values_into
from tersor.graph.layer_selection import Layer
from tersor.quantization.qdq_placement import fused_end


@dataclass(frozen=True)
class Section:
    """A part of a network that reads one value and gives one.

    Attributes:
        begin: name of the node that gives what it reads.
        end: name of the node that gives what it gives.
        layers: names of the convolutions and fully connected layers in it.
    """

    begin: str
    end: str
    layers: tuple[str, ...]


def sections(graph: fx.GraphModule) -> list[Section]:
    """The smallest sections of a network that hold a layer each, one behind the other, in its order.

    What follows a layer and needs no other (BatchNorm, an activation, a quantizer) belongs to the layer's section.
    """
    nodes = list(graph.graph.nodes)
    places = {node: place for place, node in enumerate(nodes)}
    last_read = {node: max((places[user] for user in node.users), default=-1) for node in nodes if node.op != "output"}
    cuts = [node for node in nodes if node.op != "output" and _alone(node, nodes, places, last_read)]
    found: list[Section] = []
    begin = cuts[0]
    for end in cuts[1:]:
        layers = _layers(nodes[places[begin] + 1 : places[end] + 1])
        if layers:
            found.append(Section(begin.name, end.name, layers))
        elif found:
            found[-1] = Section(found[-1].begin, end.name, found[-1].layers)
        if found:  # what comes before the first layer belongs to it
            begin = end
    return found


def _alone(node: fx.Node, nodes: list[fx.Node], places: dict[fx.Node, int], last_read: dict[fx.Node, int]) -> bool:
    """Whether `node` gives a tensor, and nothing that came before it is read after it."""
    if any(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users):
        return False
    here = places[node]
    earlier = (before for before in nodes[:here] if before.op != "get_attr")
    return last_read[node] > here and all(last_read[before] <= here for before in earlier)


def _layers(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    return tuple(str(node.target) for node in nodes if isinstance(layer_of(node), Layer))


def layer_sections(graph: fx.GraphModule, section: Section) -> list[Section]:
    """The layers of a section one by one, each with what a runtime fuses into it: its BatchNorm, its activation."""
    nodes = {node.target: node for node in graph.graph.nodes if isinstance(layer_of(node), Layer)}
    return [Section(values_into(nodes[name])[0].name, fused_end(nodes[name]).name, (name,)) for name in section.layers]


def between(
    graph: fx.GraphModule, begin: str, end: str, instead: Mapping[str, nn.Module] | None = None
) -> fx.GraphModule:
    """What computes the value of the node `end` from that of the node `begin`, over the modules of `graph`.

    Args:
        graph: a captured network.
        begin: name of a node; all that `end` needs comes from it.
        end: name of a node.
        instead: modules that take the place of those of these names.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    needed, waiting = set[fx.Node](), [nodes[end]]
    while waiting:
        node = waiting.pop()
        if node in needed or node.name == begin:
            continue
        assert node.op != "placeholder", f"{end} needs more than {begin}"
        needed.add(node)
        waiting += node.all_input_nodes
    part = fx.Graph()
    copies = {nodes[begin]: part.placeholder("values")}
    for node in graph.graph.nodes:
        if node in needed:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(copies[nodes[end]])
    given = instead or {}
    targets = {str(node.target) for node in part.nodes if node.op in {"call_module", "get_attr"}}
    held = {name: given.get(name, _held(graph, name)) for name in targets}
    return fx.GraphModule(held, part)


def _held(graph: fx.GraphModule, name: str) -> object:
    owner, _, attribute = name.rpartition(".")
    return getattr(graph.get_submodule(owner), attribute)
