"""Residual branches that can go whole, x + f(x) is x from then on, and what the answers miss without each.

Veit, Wilber and Belongie, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", NIPS 2016, take
single branches out of trained networks, which go on to work. What they cost goes with them, where a branch of few
channels still costs much: a block of ResNet-56 with half of its 32 inner channels takes 0.70 of the time in ONNX
Runtime (AVX2), with a quarter of them 0.56.

A branch is what is computed for one side of a sum alone, from what the other side is or is made of without learning.
What is missed is measured, each branch by itself on images:

    1/2 E sum_k (z'_k - mean z' - z_k + mean z)^2     z, z': logits with the branch, and without it

Where a network has BatchNorm, which is told afterwards to give what it gave (`graph/batchnorm_statistics.py`), z' is
taken with the branch's mean over images in its place. It takes about half as many runs of the network on the images as
there are branches.
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
from tersor.core.progress import NO_PROGRESS, ProgressReporter
from tersor.graph.batchnorm_statistics import with_statistics
from tersor.graph.eval_mode import evaluating, first_images
from tersor.pruning.activation_moments import centred
from tersor.pruning.channel_groups import Cut, copied, remove, run, twice
from tersor.pruning.channel_removal import alone
from tersor.pruning.dependency.shape_recording import computed, given, last_readers, mapped

_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_METHODS = ("add", "add_")


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

    def __str__(self) -> str:
        return f"{self.layers[0]} to {self.layers[-1]}"


def branches(graph: fx.GraphModule, example: Tensor) -> list[Branch]:
    """Those that learn and can go together, in the order of the graph; of such as lie in each other the smaller ones.

    Args:
        graph: a captured network; it comes back as it was.
        example: images (N, C, H, W); the first is run.

    Raises:
        InputError: the network does not run on the images.
    """
    example = twice(graph, example)
    with evaluating(graph), torch.no_grad():
        shapes = run(graph, example)
        found = [
            Branch(node, stays, _layers(inside))
            for node in graph.graph.nodes
            for stays, side, branch in _sides(node)
            if shapes[side] == shapes[node]
            and _learns(graph, inside := alone(branch))
            and not _learns(graph, alone(side))
            and _begins(side) & _read(inside)
        ]
        taken = set[str]()
        smallest: list[Branch] = []
        for each in sorted(found, key=lambda branch: len(branch.layers)):
            if taken.isdisjoint((each.total.name, *each.layers)):
                smallest.append(each)
                taken |= {each.total.name, *each.layers}
        chosen = [each for each in found if each in smallest]
        if not chosen or _goes(graph, chosen, example):
            return chosen
        together: list[Branch] = []
        for each in chosen:
            together += [each] * _goes(graph, [*together, each], example)
        return together


def removal_cost(
    graph: fx.GraphModule,
    found: Sequence[Branch],
    data: Iterable[Any],
    images: int,
    progress: ProgressReporter = NO_PROGRESS,
) -> list[float]:
    """Of every branch what the answers change by without it.

    Args:
        graph: the network that they are of; it comes back as it was.
        found: by `branches`.
        data: batches of images (N, C, H, W).
        images: how many of them are looked at.
        progress: reports every run without a branch.

    Raises:
        InputError: there are no images, or one and a mean is to be seen, the network gives no tensor of logits, or
            something is not finite.
    """
    means = bool(with_statistics(graph))
    with evaluating(graph), torch.no_grad():
        batches = list(first_images(data, images, next(graph.parameters()).device))
        count = sum(map(len, batches))
        if count <= means:
            raise InputError(
                f"what the answers miss without a branch is seen on {1 + means} images at least; given {count}. "
                "Pass more as data=..., or write branches: 0."
            )
        instead = _means(graph, found, batches) if means else {}
        changes = dict.fromkeys(found, 0.0)
        progress.start("change of the logits without each branch", len(found) * len(batches))
        for some in batches:
            answers = centred(_logits(graph(some.clone())))
            for branch, live in _met(graph, found, some):
                total = live[branch.sides[0]] + instead.get(branch, 0)
                changed = _onwards(graph, branch.total, {**live, branch.total: total})
                changes[branch] += float((centred(_logits(changed)) - answers).square().sum()) / 2
                progress.advance()
    if not all(map(math.isfinite, changes.values())):
        raise InputError(
            "what the answers miss without a branch is not finite. Give images, and a network, without NaN and "
            "infinity, or write branches: 0."
        )
    return [change / count for change in changes.values()]


def _means(graph: fx.GraphModule, found: Sequence[Branch], batches: Sequence[Tensor]) -> dict[Branch, Tensor]:
    """Of every branch its mean over images, (1, ...), where all images give values of one size."""
    sums: dict[Branch, Tensor] = {}
    uneven = set[Branch]()
    for some in batches:
        for branch, live in _met(graph, found, some):
            value = live[branch.sides[1]]
            each = value.sum(0, keepdim=True)
            if len(value) == len(some) and (branch not in sums or sums[branch].shape == each.shape):
                sums[branch] = sums.get(branch, 0) + each
            else:
                uneven.add(branch)
    count = sum(map(len, batches))
    return {branch: each / count for branch, each in sums.items() if branch not in uneven}


def _logits(answers: Any) -> Tensor:
    if not isinstance(answers, Tensor):
        raise InputError(
            f"what the answers miss without a branch is told by logits (N, classes), and the network gives a "
            f"{type(answers).__name__}. Write branches: 0."
        )
    return answers


def _sides(node: fx.Node) -> Iterator[tuple[int, fx.Node, fx.Node]]:
    """Of a sum of two values: number of the one that may stay, it, and the other one; and the other way round."""
    adds = (node.op == "call_function" and node.target in _FUNCTIONS) or (
        node.op == "call_method" and node.target in _METHODS
    )
    if adds and not node.kwargs and len(node.args) == 2:
        left, right = node.args
        if isinstance(left, fx.Node) and isinstance(right, fx.Node) and left is not right:
            yield from ((0, left, right), (1, right, left))


def _read(nodes: set[fx.Node]) -> set[fx.Node]:
    """What these are computed from."""
    return {each for node in nodes for each in node.all_input_nodes} - nodes


def _begins(side: fx.Node) -> set[fx.Node]:
    """What a side is made of alone, or itself."""
    inside = alone(side)
    return _read(inside) if inside else {side}


def _layers(inside: set[fx.Node]) -> tuple[str, ...]:
    """What is called in there, and nowhere else."""
    called = [node for node in next(iter(inside)).graph.nodes if node.op == "call_module"]
    elsewhere = {node.target for node in called if node not in inside}
    return tuple(dict.fromkeys(str(each.target) for each in called if each in inside and each.target not in elsewhere))


def _learns(graph: fx.GraphModule, inside: set[fx.Node]) -> bool:
    """Whether a layer with parameters is called in there, and nowhere else."""
    return bool(inside) and any(True for name in _layers(inside) for _ in graph.get_submodule(name).parameters())


def _goes(graph: fx.GraphModule, found: Sequence[Branch], example: Tensor) -> bool:
    """Whether the network without them gives what it gives when they are not added."""
    last, values = last_readers(graph), dict[fx.Node, Any]()
    stays = {branch.total: branch.sides[0] for branch in found}
    for node in graph.graph.nodes:
        if node in stays:
            values[node] = values[stays[node]].clone()
        else:
            values[node] = given(node, example.clone()) if node.op == "placeholder" else computed(graph, node, values)
        for read in last.get(node, ()):
            del values[read]
    cut = copied(graph)
    try:
        remove(cut, [branch.cut for branch in found])
        answers = cut(example.clone())
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False
    expected, given_now = list[Tensor](), list[Tensor]()
    mapped(values.popitem()[1], expected.append)  # the output, which nothing reads
    mapped(answers, given_now.append)
    pairs = zip(expected, given_now, strict=True)
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True) for one, other in pairs)


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
