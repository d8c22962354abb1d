"""Residual branches that can go whole, x + f(x) is x from then on, and what the answers miss without each.

Veit, Wilber and Belongie, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", NIPS 2016, take
single branches out of trained networks, which go on to work. What they cost goes with them, where a branch of few
channels still costs much: a block of ResNet-56 with half of its 32 inner channels takes 0.70 of the time in ONNX
Runtime (AVX2), with a quarter of them 0.56.

A branch is what is computed for one side of a sum alone, and is as large as the sum. What is missed is measured, each
branch by itself, with its mean over images in its place:

    1/2 E sum_k (z'_k - mean z' - z_k + mean z)^2     z, z': logits with the branch, and with its mean
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tersor.core.errors import InputError
from tersor.core.evaluating import evaluating
from tersor.graph.calibration import first_images
from tersor.graph.channels import Cut
from tersor.graph.coupling.recording import computed, given, last_readers, mapped, record
from tersor.graph.readings import centred

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


@dataclass(frozen=True)
class Branch:
    """Of a captured network.

    Attributes:
        total: the sum that it is one side of.
        stays: number of the argument that the sum gives without it.
        layers: that are called in it alone, in their order.
    """

    total: fx.Node
    stays: int
    layers: tuple[str, ...]

    @property
    def cut(self) -> Cut:
        """What `remove` takes."""
        return Cut(self.total.name, f"gives={self.stays}", ())

    @property
    def sides(self) -> tuple[fx.Node, fx.Node]:
        """What stays, and what it adds to it."""
        stays, added = self.total.args[self.stays], self.total.args[1 - self.stays]
        assert isinstance(stays, fx.Node)
        assert isinstance(added, fx.Node)
        return stays, added


def branches(graph: fx.GraphModule, example: Tensor) -> list[Branch]:
    """Those with parameters in them, in the order of the graph; of a sum's two sides the one of more layers, of
    branches that lie in each other the smaller ones.

    Args:
        graph: a captured network; it comes back as it was.
        example: one image (1, C, H, W).
    """
    example = example[:1].to(next(graph.parameters()).device)
    with evaluating(graph), torch.no_grad():
        shapes = record(graph, torch.cat([example, example]))  # of one image values may be as large as parameters
    found: list[Branch] = []
    for node in graph.graph.nodes:
        sides = [(_layers(_for(side)), stays) for stays, side in _sides(node) if shapes[side] == shapes[node]]
        layers, stays = max(sides, default=((), 0), key=lambda side: len(side[0]))
        if _learns(graph, layers) and shapes[node.args[stays]] == shapes[node]:
            found.append(Branch(node, stays, layers))
    taken = set[str]()
    smallest: list[Branch] = []
    for each in sorted(found, key=lambda branch: len(branch.layers)):
        if taken.isdisjoint((each.total.name, *each.layers)):
            smallest.append(each)
            taken |= {each.total.name, *each.layers}
    return [each for each in found if each in smallest]


def missed(graph: fx.GraphModule, found: Sequence[Branch], data: Iterable[Any], images: int) -> list[float]:
    """Of every branch what the answers change by without it.

    Args:
        graph: the network that they are of; it comes back as it was.
        found: by `branches`.
        data: batches of images (N, C, H, W).
        images: how many of them are looked at.

    Raises:
        InputError: there is no image, the network gives no tensor of logits, or something is not finite.
    """
    with evaluating(graph), torch.no_grad():
        batches = list(first_images(data, images, next(graph.parameters()).device))
        sums: dict[Branch, Any] = dict.fromkeys(found, 0.0)
        for some in batches:
            for branch, live in _met(graph, found, some):
                sums[branch] += live[branch.sides[1]].sum(0, keepdim=True)
        count = sum(map(len, batches))
        if not count:
            raise InputError("what the answers miss is seen on images; none were given. Pass data=...")
        changes = dict.fromkeys(found, 0.0)
        for some in batches:
            answers = centred(_logits(graph(some.clone())))
            for branch, live in _met(graph, found, some):
                total = live[branch.sides[0]] + sums[branch] / count
                changed = _onwards(graph, branch.total, {**live, branch.total: total})
                changes[branch] += float((centred(_logits(changed)) - answers).square().sum()) / 2
    if not all(map(math.isfinite, changes.values())):
        raise InputError(
            "what the answers miss without a branch is not finite. Give images, and a network, without NaN and "
            "infinity, or write branches: 0."
        )
    return [change / count for change in changes.values()]


def _logits(answers: Any) -> Tensor:
    if not isinstance(answers, Tensor):
        raise InputError(
            f"what the answers miss without a branch is told by logits (N, classes), and the network gives a "
            f"{type(answers).__name__}. Write branches: 0."
        )
    return answers


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
    return alone


def _layers(alone: set[fx.Node]) -> tuple[str, ...]:
    """What is called in there, and nowhere else."""
    called = [node for node in next(iter(alone)).graph.nodes if node.op == "call_module"] if alone else []
    elsewhere = {node.target for node in called if node not in alone}
    return tuple(str(node.target) for node in called if node in alone and node.target not in elsewhere)


def _learns(graph: fx.GraphModule, layers: Sequence[str]) -> bool:
    return any(True for name in layers for _ in graph.get_submodule(name).parameters())


def _met(graph: fx.GraphModule, found: Sequence[Branch], some: Tensor) -> Iterator[tuple[Branch, dict[fx.Node, Any]]]:
    """Every branch as a run comes to its sum, and the values of that moment that are still read."""
    last, values = last_readers(graph), dict[fx.Node, Any]()
    sums: Mapping[fx.Node, Branch] = {branch.total: branch for branch in found}
    for node in graph.graph.nodes:
        if node in sums:
            yield sums[node], dict(values)
        values[node] = given(node, some.clone()) if node.op == "placeholder" else computed(graph, node, values)
        for read in last.get(node, ()):
            del values[read]


def _onwards(graph: fx.GraphModule, total: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What the network gives, from behind `total` on; `values` stay as they are."""
    last = last_readers(graph)
    own = {node: mapped(value, Tensor.clone) for node, value in values.items()}
    behind, node = own[total], total
    for read in last.get(total, ()):
        own.pop(read, None)
    while (node := node.next).op != "root":
        behind = own[node] = computed(graph, node, own)
        for read in last.get(node, ()):
            own.pop(read, None)
    return behind
