"""The order in which channels are removed, and the remaining cost after each block.

Channels are removed in blocks that leave a multiple of `round_to` in each group: runtimes are slow at other widths.
What a block saves is computed from the shapes of the layers it shrinks, so that all blocks together take one pass over
the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from tersor.core.errors import InputError
from tersor.data.network_inputs import NetworkInput
from tersor.graph.layer_selection import Convolution, TransposedConvolution, matching
from tersor.graph.parametrization import parametrizations_of
from tersor.pruning.channel_groups import Cut, Group, copy_graph, coupled_channels, merge_cuts, remove
from tersor.pruning.mask import Mask
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.range_tracking import RunningLargest

Scope = Literal["layer", "global"]

_REASONS = 3
"""Reasons that an error names where no group can be removed."""


@dataclass(frozen=True)
class RemovalOrder:
    """Blocks of channels in the order of their removal.

    Attributes:
        groups: groups of coupled channels.
        channels: the channels of every group, the least important first.
        blocks: for each block the index of its group, and how many channels of the group are removed up to and
            including it.
    """

    groups: Sequence[Group]
    channels: Sequence[Sequence[int]]
    blocks: Sequence[tuple[int, int]]

    def removed(self, blocks: int) -> list[Sequence[int]]:
        """The channels of every group in the first `blocks` blocks."""
        ends = [0] * len(self.groups)
        for number, end in self.blocks[:blocks]:
            ends[number] = end
        return [channels[:end] for channels, end in zip(self.channels, ends, strict=True)]

    def cuts(self, blocks: int) -> list[Cut]:
        """The cuts of the first `blocks` blocks."""
        pairs = zip(self.groups, self.removed(blocks), strict=True)
        return merge_cuts(cut for group, removed in pairs for cut in group.cuts(removed))

    def postponed(self, block: int) -> RemovalOrder:
        """The order with this block, and all later ones of its group, at the end."""
        last = [each for each in self.blocks[block:] if each[0] == self.blocks[block][0]]
        return replace(self, blocks=[*(each for each in self.blocks if each not in last), *last])

    def pruned_copy(self, graph: fx.GraphModule, blocks: int) -> fx.GraphModule:
        """A copy of `graph` without the first `blocks` blocks."""
        network = copy_graph(graph)
        remove(network, self.cuts(blocks))
        return network


def removable_groups(
    graph: fx.GraphModule, example: NetworkInput, exclude: Sequence[str], method: str
) -> tuple[list[Group], dict[str, str]]:
    """The groups that can be removed, and root -> reason for all others.

    Args:
        graph: a captured network.
        example: images (N, C, H, W); the first one is run.
        exclude: patterns of layers whose channels are not removed.
        method: its name, for errors.

    Raises:
        InputError: the network has masks, quantizers or other parametrizations, a pattern matches nothing, or no
            channel can be removed.
    """
    refuse_parametrized(graph, method)
    excluded = matching(exclude, [name for name, _ in graph.named_modules() if name]) if exclude else set[str]()
    groups, unprunable = coupled_channels(graph, example)
    chosen = [group for group in groups if not any(_written_layer(cut) in excluded for cut in group.slices[0])]
    if not chosen:
        given = list(unprunable.items())[:_REASONS]
        reasons = "".join(f" The channels of {root} stay, since {reason}." for root, reason in given)
        raise InputError(
            f"no channel of {type(graph).__name__} can be removed.{reasons} In a recipe, weight_pruning can mask "
            "weights instead." + (" Or shorten `exclude`." if exclude else "")
        )
    return chosen, unprunable


def refuse_parametrized(graph: fx.GraphModule, method: str) -> None:
    """Refuse masks, quantizers and parametrizations of others: the weights under them cannot be cut.

    Raises:
        InputError: the network has one.
    """
    for name, module in graph.named_modules():
        foreign = [
            each for each in parametrizations_of(module) if not isinstance(each, Mask | FakeQuantize | RunningLargest)
        ]
        if foreign:
            raise InputError(
                f"the weight of {name} has a {type(foreign[0]).__name__} parametrization, so its channels cannot be "
                "removed. Call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first."
            )
        if isinstance(module, FakeQuantize) or parametrize.is_parametrized(module):
            raise _comes_too_late(name or "the network", [module, *parametrizations_of(module)], method)


def _comes_too_late(name: str, found: Sequence[nn.Module], method: str) -> InputError:
    """The error for a method that must run before the one that added `found` to a layer."""
    in_python = " In Python, call tersor.prune before tersor.quantize." * (method == "channel_pruning")
    if any(isinstance(each, FakeQuantize) for each in found):
        what, others, more = "is already quantized", "the one that quantizes, such as ptq or qat", in_python
    elif any(isinstance(each, Mask) for each in found):
        what, others, more = "is already masked", "the one that masks weights, such as weight_pruning", ""
    else:
        what, others, more = "has a running range of an earlier psgd (range: running)", "psgd", ""
    return InputError(
        f"{name} {what}; {method} must come before that. In a recipe, write {method} in a stage before {others}.{more}"
    )


def _written_layer(cut: Cut) -> str:
    """The layer whose output channels are cut; "" for input channels."""
    if str(cut.axis) == "0":
        return cut.layer.rpartition(".")[0]
    return cut.layer if cut.axis == "out" else ""


def removal_order(
    groups: Sequence[Group],
    importances: Sequence[Tensor],
    *,
    scope: Scope,
    round_to: int,
    floor: float,
    channel_costs: Sequence[float] | None = None,
) -> RemovalOrder:
    """Sort blocks of channels by importance.

    Args:
        groups: groups of coupled channels.
        importances: importance of every group (channels,).
        scope: `layer`: the next block is of the group that has lost the smallest fraction; `global`: the block with
            the lowest mean importance.
        round_to: the number of remaining output channels of the root is a multiple of this.
        floor: fraction of a group that always remains.
        channel_costs: cost of one channel of every group; importances are divided by them.
    """
    if channel_costs is not None:
        importances = [each / max(cost, 1e-9) for each, cost in zip(importances, channel_costs, strict=True)]
    blocks = sorted(
        (priority, number, end)
        for number, (group, scores) in enumerate(zip(groups, importances, strict=True))
        for priority, end in _blocks(scores.sort().values, scope, round_to // math.gcd(round_to, group.width), floor)
    )
    channels = [scores.argsort(stable=True).tolist() for scores in importances]
    return RemovalOrder(groups, channels, [(number, end) for _, number, end in blocks])


def _blocks(ascending: Tensor, scope: Scope, unit: int, floor: float) -> Iterator[tuple[tuple[float, float], int]]:
    """The priority of each block of a group (lowest first), and how many channels are removed after it."""
    size = len(ascending)
    least = max(1, math.ceil(floor * size), min(size, unit))
    start = 0
    for remaining in range((size - 1) // unit * unit, least - 1, -unit):
        end = size - remaining
        importance = float(ascending[start:end].mean())
        yield ((end / size, importance) if scope == "layer" else (importance, end / size)), end
        start = end


def remaining_costs(kind: str, graph: fx.GraphModule, order: RemovalOrder, macs: Mapping[str, int]) -> list[float]:
    """The fraction of the cost that remains after each number of blocks, from none to all.

    Args:
        kind: the kind of cost: `macs`, `parameters`, or `channels` of the groups.
        graph: the unpruned network.
        order: the order of removal.
        macs: MACs of the network, by layer.
    """
    if kind == "channels":
        channels = sum(len(group.slices) for group in order.groups)
        return _remaining_fractions(order, channels, lambda _number, removed: len(removed))
    layers = _layer_costs(kind, graph, macs)
    total = sum(macs.values()) if kind == "macs" else sum(parameter.numel() for parameter in graph.parameters())
    slices = [[_costly_slices(layers, cuts) for cuts in group.slices] for group in order.groups]

    def saved(number: int, removed: Sequence[int]) -> float:
        each = (part for channel in removed for part in slices[number][channel])
        return sum(layer.remove(axis, count) for layer, axis, count in each)

    return _remaining_fractions(order, total, saved)


def channel_costs(kind: str, graph: fx.GraphModule, groups: Sequence[Group], macs: Mapping[str, int]) -> list[float]:
    """The cost of the first channel of each group in the unpruned network; arguments as in `remaining_costs`."""
    if kind == "channels":
        return [1.0] * len(groups)
    found: list[float] = []
    for group in groups:
        slices = _costly_slices(_layer_costs(kind, graph, macs), group.slices[0])
        found.append(sum(layer.remove(axis, count) for layer, axis, count in slices))
    return found


def _layer_costs(kind: str, graph: fx.GraphModule, macs: Mapping[str, int]) -> dict[str, _LayerCost]:
    counted = kind == "macs"
    return {name: _LayerCost(module, macs.get(name, 0) if counted else None) for name, module in graph.named_modules()}


def _costly_slices(layers: Mapping[str, _LayerCost], cuts: Sequence[Cut]) -> list[tuple[_LayerCost, str, int]]:
    """Layer, axis and number of channels. Where whole groups of a convolution go, only the rows are counted."""
    return [
        (layers[cut.layer], cut.axis, len(cut.channels))
        for cut in cuts
        if cut.axis == "out" or (cut.axis == "in" and not layers[cut.layer].loses_groups(cut.channels))
    ]


def _remaining_fractions(
    order: RemovalOrder, total: float, saved: Callable[[int, Sequence[int]], float]
) -> list[float]:
    """The remaining fraction of `total` after each number of blocks."""
    remaining, fractions, ends = total, [1.0], [0] * len(order.groups)
    for number, end in order.blocks:
        remaining -= saved(number, order.channels[number][ends[number] : end])
        ends[number] = end
        fractions.append(remaining / total)
    return fractions


class _LayerCost:
    """The cost of a layer while channels are removed: rows * columns of a matrix, plus parameters of each row."""

    def __init__(self, module: nn.Module, macs: int | None) -> None:
        shapes = [parameter.shape for parameter in module.parameters(recurse=False) if parameter.ndim]
        matrices = [shape for shape in shapes if len(shape) > 1]
        self.groups = module.groups if isinstance(module, Convolution) else 1
        self.rows = shapes[0][0] if shapes else 0
        self.columns = matrices[0][1] * self.groups if matrices else 1
        if isinstance(module, TransposedConvolution):
            self.rows, self.columns = self.columns, self.rows
        if macs is not None:
            self.per_entry, self.per_row = macs / max(1, self.rows * self.columns), 0.0
        else:
            self.per_entry = sum(math.prod(shape) for shape in matrices) / max(1, self.rows * self.columns)
            self.per_row = float(sum(1 for shape in shapes if len(shape) == 1))

    def loses_groups(self, channels: Sequence[int]) -> bool:
        """Whether the columns are those of whole groups of a convolution, not the same of every group."""
        width = self.columns // self.groups
        return self.groups > 1 and len({channel // width for channel in channels}) < self.groups

    def remove(self, axis: str, count: int) -> float:
        """Remove rows or columns; return the saved cost."""
        if axis == "in":
            self.columns -= count
            return self.per_entry * self.rows * count
        self.rows -= count
        return (self.per_entry * self.columns + self.per_row) * count
