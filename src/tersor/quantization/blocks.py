"""Blocks: parts of a captured network, divided at nodes whose value is the only input of all later nodes.

    x -> [conv1 bn relu] -> [conv bn relu conv bn +] -> [...] -> [mean linear] -> logits

A residual block is one block, and so is each layer of a sequence. If a network returns several tensors, all layers
after the last such node form one block, which ends at the output of the network. `between` runs a part of the network
on its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx, nn

from tersor.graph.aten import operator_name
from tersor.graph.capture import has_batch_dimension, is_size, layer_of, values_into
from tersor.graph.layer_selection import Layer
from tersor.quantization.qdq_placement import fused_end


@dataclass(frozen=True)
class Block:
    """A part of a network with one input value and one output value.

    Attributes:
        begin: name of the node that is its input.
        end: name of the node that is its output, or of the network's output node.
        layers: names of its convolutions and fully connected layers.
    """

    begin: str
    end: str
    layers: tuple[str, ...]


def blocks(graph: fx.GraphModule) -> list[Block]:
    """The smallest blocks of a network that contain at least one layer, in order.

    A block includes the BatchNorms, activations and quantizers after its layers; the first includes the input too.
    """
    nodes = list(graph.graph.nodes)
    places = {node: place for place, node in enumerate(nodes)}
    last_read = {node: max((places[user] for user in node.users), default=-1) for node in nodes if node.op != "output"}
    cuts = [node for node in nodes if node.op != "output" and _alone(node, nodes, places, last_read)]
    found: list[Block] = []
    begin = cuts[0]
    for end in cuts[1:]:
        layers = _layers(nodes[places[begin] + 1 : places[end] + 1])
        if layers:
            found.append(Block(begin.name, end.name, layers))
        elif found:
            found[-1] = Block(found[-1].begin, end.name, found[-1].layers)
        if found:
            begin = end
    tail = _layers(nodes[places[begin] + 1 :])
    return [*found, Block(begin.name, nodes[-1].name, tail)] if tail else found


def _alone(node: fx.Node, nodes: list[fx.Node], places: dict[fx.Node, int], last_read: dict[fx.Node, int]) -> bool:
    """Whether `node` is a tensor with a batch dimension, and no earlier value is read after it, sizes apart."""
    if any(operator_name(user) == "getitem" for user in node.users) or is_size(node) or not has_batch_dimension(node):
        return False
    here = places[node]
    earlier = (before for before in nodes[:here] if before.op != "get_attr" and not is_size(before))
    return last_read[node] > here and all(last_read[before] <= here for before in earlier)


def _layers(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    return tuple(str(node.target) for node in nodes if isinstance(layer_of(node), Layer))


def layer_blocks(graph: fx.GraphModule, block: Block) -> list[Block]:
    """One block per layer of `block`, each with the BatchNorm and activation that a runtime fuses into the layer."""
    nodes = {node.target: node for node in graph.graph.nodes if isinstance(layer_of(node), Layer)}
    return [Block(values_into(nodes[name])[0].name, fused_end(nodes[name]).name, (name,)) for name in block.layers]


def between(
    graph: fx.GraphModule, begin: str, end: str, instead: Mapping[str, nn.Module] | None = None
) -> fx.GraphModule:
    """A graph over the modules of `graph` that computes the node `end` from the node `begin`.

    Where `end` is the output node, it returns a tuple of all tensors (N, ...) that the network returns.

    Args:
        graph: a captured network.
        begin: name of a node; `end` depends on no other input.
        end: name of a node.
        instead: replacements of modules, by name.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    is_output = nodes[end].op == "output"
    ends = [each for each in nodes[end].all_input_nodes if has_batch_dimension(each)] if is_output else [nodes[end]]
    needed, waiting = set[fx.Node](), [*ends]
    while waiting:
        node = waiting.pop()
        if node in needed or node.name == begin:
            continue
        if operator_name(node) == "sym_size":  # the batch size, which the values at `begin` have too
            needed.add(node)
            continue
        assert node.op != "placeholder", f"{end} needs more than {begin}"
        needed.add(node)
        waiting += node.all_input_nodes
    part = fx.Graph()
    copies = {nodes[begin]: part.placeholder("values")}
    for node in graph.graph.nodes:
        if node in needed:
            from_begin = operator_name(node) == "sym_size" and node.args[0] not in copies
            read = (lambda _: copies[nodes[begin]]) if from_begin else copies.__getitem__
            copies[node] = part.node_copy(node, read)
    part.output(tuple(copies[each] for each in ends) if is_output else copies[nodes[end]])
    targets = {str(node.target) for node in part.nodes if node.op in {"call_module", "get_attr"}}
    members = {name: (instead or {}).get(name, _attribute(graph, name)) for name in targets}
    return fx.GraphModule(members, part)


def _attribute(graph: fx.GraphModule, name: str) -> object:
    owner, _, attribute = name.rpartition(".")
    return getattr(graph.get_submodule(owner), attribute)
