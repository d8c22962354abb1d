"""Removal of whole residual branches: x + f(x) becomes x. Which branches can be removed, and the cost of each removal.

Veit, Wilber and Belongie, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", NIPS 2016, remove
single branches from trained networks, which still work. A branch with few channels is still slow, and a removed one
costs nothing: a block of ResNet-56 with half of its 32 inner channels takes 0.70 of the time in ONNX Runtime (AVX2),
with a quarter of them 0.56.

A branch is the part of the graph that only one operand of an addition depends on. Its input is the other operand (the
shortcut), or a value from which the shortcut is computed without learned layers. Its removal cost is measured, each
branch on its own:

    1/2 E sum_k (z'_k - mean z' - z_k + mean z)^2     z, z': logits (N, classes, ...) with and without the branch

Where the task has no logits, it is half of the relative squared error of all outputs. In networks with BatchNorm, whose
statistics are corrected afterwards (`graph/batchnorm_statistics.py`), the branch's mean over the images replaces the
branch in z'. The cost is about half as many forward passes as there are branches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tersor.core.errors import InputError, counted
from tersor.core.progress import NO_PROGRESS, ProgressReporter
from tersor.data.network_inputs import NetworkInput
from tersor.graph.aten import operator_name
from tersor.graph.batchnorm_statistics import with_statistics
from tersor.graph.eval_mode import evaluating, first_images
from tersor.graph.forward_call import run
from tersor.pruning.channel_groups import Cut, copy_graph, record_run, remove, two_images
from tersor.pruning.channel_removal import exclusive_nodes
from tersor.pruning.dependency.shape_recording import map_tensors, run_node, user_to_last_uses
from tersor.pruning.output_changes import squared_change
from tersor.quantization.operators import run_through
from tersor.tasks.classification import CLASSIFICATION
from tersor.tasks.task import Task


@dataclass(frozen=True)
class Branch:
    """A residual branch of a captured network.

    Attributes:
        total: the sum that it is one side of.
        keep: number of the argument that replaces the sum.
        layers: called in the branch alone, in their order.
    """

    total: fx.Node
    keep: int
    layers: tuple[str, ...]

    @property
    def cut(self) -> Cut:
        """The branch as `remove` takes it."""
        return Cut(self.total.name, f"gives={self.keep}", ())

    @property
    def sides(self) -> tuple[fx.Node, fx.Node]:
        """The shortcut, and the output of the branch."""
        shortcut, added = self.total.args[self.keep], self.total.args[1 - self.keep]
        assert isinstance(shortcut, fx.Node)
        assert isinstance(added, fx.Node)
        return shortcut, added

    def __str__(self) -> str:
        return f"{self.layers[0]} to {self.layers[-1]}"


def find_branches(graph: fx.GraphModule, example: NetworkInput) -> list[Branch]:
    """Learned branches that can be removed together, in the order of the graph; the inner ones of nested branches.

    Args:
        graph: a captured network; unchanged afterwards.
        example: images (N, C, H, W); the first one is run.

    Raises:
        InputError: the network does not run on the images.
    """
    example = two_images(graph, example)
    with evaluating(graph), torch.no_grad():
        shapes = record_run(graph, example)
        candidates = [
            Branch(node, keep, _own_layers(inside))
            for node in graph.graph.nodes
            for keep, shortcut, branch in _sides(node)
            if shapes[shortcut] == shapes[node]
            and _has_parameters(graph, inside := exclusive_nodes(branch))
            and not _has_parameters(graph, exclusive_nodes(shortcut))
            and _sources(shortcut) & _inputs(inside)
        ]
        used = set[str]()
        innermost: list[Branch] = []
        for each in sorted(candidates, key=lambda branch: len(branch.layers)):
            if used.isdisjoint((each.total.name, *each.layers)):
                innermost.append(each)
                used |= {each.total.name, *each.layers}
        chosen = [each for each in candidates if each in innermost]
        if not chosen or _can_remove(graph, chosen, example):
            return chosen
        together: list[Branch] = []
        for each in chosen:
            together += [each] * _can_remove(graph, [*together, each], example)
        return together


def removal_cost(
    graph: fx.GraphModule,
    branches: Sequence[Branch],
    data: Iterable[Any],
    images: int,
    progress: ProgressReporter = NO_PROGRESS,
    task: Task = CLASSIFICATION,
) -> list[float]:
    """The change of the outputs without each branch.

    Args:
        graph: the network of the branches; unchanged afterwards.
        branches: the branches that `find_branches` returned.
        data: batches of images (N, C, H, W).
        images: how many of them are used.
        progress: reports every run without a branch.
        task: gives the logits.

    Raises:
        InputError: there are no images, or a single one for a network with BatchNorm, the network returns no
            floating-point tensor, or a value is not finite.
    """
    means = bool(with_statistics(graph))
    with evaluating(graph), torch.no_grad():
        batches = list(first_images(data, images, next(graph.parameters()).device))
        count = sum(map(len, batches))
        if count <= means:
            raise InputError(
                "to choose residual branches, tersor measures how the outputs change on at least "
                f"{counted(1 + means, 'image')}; given: {count}. Pass more images, or write branches: 0."
            )
        replacements = _means(graph, branches, batches) if means else {}
        changes = dict.fromkeys(branches, 0.0)
        progress.start("effect of removing each residual branch", len(branches) * len(batches))
        for batch in batches:
            outputs = run(graph, batch.clone())
            for branch, live in _at_each_sum(graph, branches, batch):
                total = live[branch.sides[0]] + replacements.get(branch, 0)
                changed = _run_after(graph, branch.total, {**live, branch.total: total})
                changes[branch] += squared_change(changed, outputs, task, len(batch)) / 2
                progress.advance()
    if not all(map(math.isfinite, changes.values())):
        raise InputError(
            "when a branch is removed, the change of the outputs is infinite or NaN. Check images and weights for NaN "
            "and infinity, or write branches: 0."
        )
    return [change / count for change in changes.values()]


def cost_shares(
    graph: fx.GraphModule, branches: Sequence[Branch], example: NetworkInput, *, parameters: bool
) -> list[float]:
    """The share of the MACs that each branch has, or of the parameters.

    Args:
        graph: the network of the branches; unchanged afterwards.
        branches: the branches that `find_branches` returned.
        example: images (N, C, H, W); the first one is run.
        parameters: whether parameters are counted.
    """
    inside = [exclusive_nodes(each.sides[1]) for each in branches]
    if parameters:
        counts = [_parameters(graph, nodes) for nodes in inside]
        total = sum(parameter.numel() for parameter in graph.parameters())
    else:
        products = run_through(graph, example[:1]).products
        counts = [sum(product.macs for product in products if product.node in nodes) for nodes in inside]
        total = sum(product.macs for product in products)
    return [count / total for count in counts]


def _means(graph: fx.GraphModule, branches: Sequence[Branch], batches: Sequence[NetworkInput]) -> dict[Branch, Tensor]:
    """The mean output of every branch over the images, (1, ...), where it has the same shape for all images."""
    sums: dict[Branch, Tensor] = {}
    uneven = set[Branch]()
    for batch in batches:
        for branch, live in _at_each_sum(graph, branches, batch):
            value = live[branch.sides[1]]
            each = value.sum(0, keepdim=True)
            if len(value) == len(batch) and (branch not in sums or sums[branch].shape == each.shape):
                sums[branch] = sums.get(branch, 0) + each
            else:
                uneven.add(branch)
    count = sum(map(len, batches))
    return {branch: each / count for branch, each in sums.items() if branch not in uneven}


def _sides(node: fx.Node) -> Iterator[tuple[int, fx.Node, fx.Node]]:
    """For both sides of a sum: number of the side that could stay, that side, and the other one."""
    if operator_name(node) in ("add", "add_") and not node.kwargs:
        left, right = node.args
        if isinstance(left, fx.Node) and isinstance(right, fx.Node) and left is not right:
            yield from ((0, left, right), (1, right, left))


def _inputs(nodes: set[fx.Node]) -> set[fx.Node]:
    """What these nodes are computed from."""
    return {each for node in nodes for each in node.all_input_nodes} - nodes


def _sources(side: fx.Node) -> set[fx.Node]:
    """What a side alone is computed from, or the side itself."""
    inside = exclusive_nodes(side)
    return _inputs(inside) if inside else {side}


def _own_layers(inside: set[fx.Node]) -> tuple[str, ...]:
    """Layers called by these nodes alone."""
    called = [node for node in next(iter(inside)).graph.nodes if node.op == "call_module"]
    elsewhere = {node.target for node in called if node not in inside}
    return tuple(dict.fromkeys(str(each.target) for each in called if each in inside and each.target not in elsewhere))


def _has_parameters(graph: fx.GraphModule, inside: set[fx.Node]) -> bool:
    return bool(inside) and any(True for name in _own_layers(inside) for _ in graph.get_submodule(name).parameters())


def _parameters(graph: fx.GraphModule, inside: set[fx.Node]) -> int:
    """The number of parameters that only these nodes read."""
    known = dict(graph.named_parameters())
    read = [known[str(node.target)] for node in inside if node.op == "get_attr" and node.target in known]
    read += [parameter for name in _own_layers(inside) for parameter in graph.get_submodule(name).parameters()]
    return sum(parameter.numel() for parameter in read)


def _can_remove(graph: fx.GraphModule, branches: Sequence[Branch], example: NetworkInput) -> bool:
    """Whether the network without the branches computes what it computes when they are not added."""
    last_uses, values, example = user_to_last_uses(graph), dict[fx.Node, Any](), example.clone()
    shortcuts = {branch.total: branch.sides[0] for branch in branches}
    pruned, images = copy_graph(graph), example.clone()
    for node in graph.graph.nodes:
        if node in shortcuts:
            values[node] = values[shortcuts[node]].clone()
        else:
            values[node] = run_node(graph, node, values, example)
        for read in last_uses.get(node, ()):
            del values[read]
    try:
        remove(pruned, [branch.cut for branch in branches])
        outputs = run(pruned, images)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False
    expected, actual = list[Tensor](), list[Tensor]()
    map_tensors(values.popitem()[1], expected.append)  # the output, which no node reads
    map_tensors(outputs, actual.append)
    pairs = zip(expected, actual, strict=True)
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True) for one, other in pairs)


def _at_each_sum(
    graph: fx.GraphModule, branches: Sequence[Branch], batch: NetworkInput
) -> Iterator[tuple[Branch, dict[fx.Node, Any]]]:
    """Run the network; at the sum of every branch, yield the branch and the values that are still needed."""
    last_uses, values, batch = user_to_last_uses(graph), dict[fx.Node, Any](), batch.clone()
    sums: Mapping[fx.Node, Branch] = {branch.total: branch for branch in branches}
    for node in graph.graph.nodes:
        if node in sums:
            yield sums[node], dict(values)
        values[node] = run_node(graph, node, values, batch)
        for read in last_uses.get(node, ()):
            del values[read]


def _run_after(graph: fx.GraphModule, total: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """The output of the network, computed from the values at `total`, which are not changed."""
    last_uses = user_to_last_uses(graph)
    own = {node: map_tensors(value, Tensor.clone) for node, value in values.items()}
    output, node = own[total], total
    for read in last_uses.get(total, ()):
        own.pop(read, None)
    while (node := node.next).op != "root":
        output = own[node] = run_node(graph, node, own)
        for read in last_uses.get(node, ()):
            own.pop(read, None)
    return output
