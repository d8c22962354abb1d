"""Residual branches that can go whole, with the channels of one group: x + f(x) is x from then on.

Veit, Wilber and Belongie, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", NIPS 2016, take
single branches out of trained networks, which go on to work. What they cost goes with them, where a branch of few
channels still costs much: a block of ResNet-56 with half of its 32 inner channels takes 0.70 of the time in ONNX
Runtime (AVX2), with a quarter of them 0.56.

A branch is what is computed for one side of an addition alone. It goes with the last group in it, the one that the
layer before the addition reads: without its channels nothing is left to add. Others that lie in it, as those of a
bottleneck's first layer or of squeeze and excitation, go with it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from tersor.core.evaluating import evaluating
from tersor.graph.channels import Cut, Group
from tersor.graph.coupling.recording import record

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


def branches(graph: fx.GraphModule, groups: Sequence[Group], example: Tensor) -> dict[int, Cut]:
    """Number of a group -> the cut that takes its branch, of those groups that have one.

    Args:
        graph: a captured network; it comes back as it was.
        groups: of its channels.
        example: one image (1, C, H, W).
    """
    with evaluating(graph), torch.no_grad():
        shapes = record(graph, example.to(next(graph.parameters()).device))
    holds = [{cut.layer for cut in group.slices[0]} for group in groups]
    reads = [{cut.layer for cut in group.slices[0] if cut.axis in ("in", "1")} for group in groups]
    found: dict[int, tuple[int, Cut]] = {}
    for node in graph.graph.nodes:
        for stays, branch in _sides(node):
            if shapes[node.args[stays]] != shapes[node]:
                continue
            there = _names(_for(branch))
            inside = [number for number, held in enumerate(holds) if all(_within(each, there) for each in held)]
            latest = {number: max((_within(each, there) for each in reads[number]), default=0) for number in inside}
            if not any(latest.values()):
                continue
            last = max(inside, key=lambda number: (latest[number], -len(groups[number].slices)))
            each = len(there), Cut(node.name, f"gives={stays}", ())
            found[last] = min(found.get(last, each), each)
    return {number: cut for number, (_, cut) in found.items()}


def _sides(node: fx.Node) -> Iterator[tuple[int, fx.Node]]:
    """Of a sum of two values: which one stays, and the other one."""
    if node.target in _ADDITIONS and not node.kwargs and len(node.args) == 2:
        left, right = node.args
        if isinstance(left, fx.Node) and isinstance(right, fx.Node) and left is not right:
            yield from ((1, left), (0, right))


def _for(branch: fx.Node) -> set[fx.Node]:
    """What is computed for the one reader of `branch` alone, and it; nothing where it has more readers."""
    alone: set[fx.Node] = set()
    waiting = [branch] if len(branch.users) == 1 else []
    while waiting:
        node = waiting.pop()
        alone.add(node)
        read = [each for each in node.all_input_nodes if each.op != "placeholder" and each not in alone]
        waiting += [each for each in read if set(each.users) <= alone]
    layers = [str(each.target) for each in branch.graph.nodes if each.op == "call_module" and each not in alone]
    return {each for each in alone if each.op != "call_module" or str(each.target) not in layers}


def _names(nodes: set[fx.Node]) -> dict[str, int]:
    """Nodes, layers and parameters by name -> their place in the graph, from 1."""
    ordered = [node for node in next(iter(nodes)).graph.nodes if node in nodes] if nodes else []
    return {name: place for place, node in enumerate(ordered, 1) for name in (node.name, str(node.target))}


def _within(name: str, there: dict[str, int]) -> int:
    """The place of what has this name, or of the layer that it lies in; 0 if it is not there."""
    owner = name.rpartition(".")[0]
    return there.get(name) or (_within(owner, there) if owner else 0)
