"""Which channels go, in which order, and what is left after each.

Channels go in blocks, since runtimes compute ragged widths slowly: what stays of a group is a multiple of `round_to`.
What a block saves is counted from what it takes of each layer, so that the whole order costs one walk over the blocks
and not one over the network for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from tersor.core.errors import InputError
from tersor.graph.layer_selection import matching
from tersor.graph.parametrization import parametrizations_of
from tersor.pruning.channel_groups import Cut, Group, copied, coupled_channels, merged, remove
from tersor.pruning.mask import Mask
from tersor.quantization.fake_quantize import FakeQuantize, RunningLargest

Scope = Literal["layer", "global"]

_REASONS = 3
"""Of groups that stay whole, where all do."""


@dataclass(frozen=True)
class Order:
    """Groups of channels, and the blocks of them that go one after the other.

    Attributes:
        groups: of coupled channels.
        channels: of every group, its channels, the least important first.
        blocks: the number of a group, and how many of its channels are gone with this block.
    """

    groups: Sequence[Group]
    channels: Sequence[Sequence[int]]
    blocks: Sequence[tuple[int, int]]

    def gone(self, blocks: int) -> list[Sequence[int]]:
        """Of every group the channels that are gone with the first `blocks`."""
        ends = [0] * len(self.groups)
        for number, end in self.blocks[:blocks]:
            ends[number] = end
        return [channels[:end] for channels, end in zip(self.channels, ends, strict=True)]

    def cuts(self, blocks: int) -> list[Cut]:
        """What goes with the first `blocks`."""
        pairs = zip(self.groups, self.gone(blocks), strict=True)
        return merged(cut for group, gone in pairs for cut in group.cuts(gone))

    def without(self, graph: fx.GraphModule, blocks: int) -> fx.GraphModule:
        """A copy of `graph`, whose groups these are, without the first `blocks`."""
        network = copied(graph)
        remove(network, self.cuts(blocks))
        return network


def removable(
    graph: fx.GraphModule, example: Tensor, exclude: Sequence[str], method: str
) -> tuple[list[Group], dict[str, str]]:
    """The groups of channels that may go, and of every other group's root why it stays whole.

    Args:
        graph: a captured network.
        example: images (N, C, H, W); the first is run.
        exclude: patterns of layers whose channels stay.
        method: how errors call who asks.

    Raises:
        InputError: masks, grids or parametrizations of others lie on the network, a pattern matches nothing, no
            channel can be removed.
    """
    refuse_what_lies_on(graph, method)
    excluded = matching(exclude, [name for name, _ in graph.named_modules() if name]) if exclude else set[str]()
    groups, whole = coupled_channels(graph, example)
    chosen = [group for group in groups if not any(_writer(cut) in excluded for cut in group.slices[0])]
    if not chosen:
        reasons = "".join(f" {root}: {why}." for root, why in list(whole.items())[:_REASONS])
        raise InputError(
            f"no channel of {type(graph).__name__} can be removed.{reasons} Possible: weight_pruning, which masks"
            + (", or a shorter `exclude`." if exclude else ".")
        )
    return chosen, whole


def refuse_what_lies_on(graph: fx.GraphModule, method: str) -> None:
    """Masks, grids and parametrizations of others: channels of weights under them cannot be cut.

    Raises:
        InputError: there is one.
    """
    for name, module in graph.named_modules():
        strange = [
            each for each in parametrizations_of(module) if not isinstance(each, Mask | FakeQuantize | RunningLargest)
        ]
        if strange:
            raise InputError(
                f"the weight of {name} lies under a {type(strange[0]).__name__}, and its channels cannot be cut. Call "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') before."
            )
        if isinstance(module, FakeQuantize) or parametrize.is_parametrized(module):
            raise InputError(
                f"{name or 'the network'} lies under a mask or a grid already, and channels are removed before. "
                f"Write {method} in a stage before weight_pruning, ptq and qat."
            )


def _writer(cut: Cut) -> str:
    """The layer or module whose channels a cut takes, where it does not take columns that read."""
    if str(cut.axis) == "0":
        return cut.layer.rpartition(".")[0]
    return cut.layer if cut.axis == "out" else ""


def ordered(
    groups: Sequence[Group],
    importances: Sequence[Tensor],
    *,
    scope: Scope,
    round_to: int,
    floor: float,
    prices: Sequence[float] | None = None,
) -> Order:
    """The order in which channels go.

    Args:
        groups: of coupled channels.
        importances: of every group (channels,).
        scope: `layer`: next is a block of the group that has lost the smallest fraction; `global`: the block of the
            lowest mean importance, among all groups.
        round_to: places of the layer that produces them, of which a multiple stays.
        floor: fraction of a group that always stays.
        prices: of every group what a channel costs: importances are compared for each unit of it; as they are if None.
    """
    if prices is not None:
        importances = [each / max(price, 1e-9) for each, price in zip(importances, prices, strict=True)]
    blocks = sorted(
        (priority, number, end)
        for number, (group, scores) in enumerate(zip(groups, importances, strict=True))
        for priority, end in _blocks(scores.sort().values, scope, round_to // math.gcd(round_to, group.width), floor)
    )
    channels = [scores.argsort(stable=True).tolist() for scores in importances]
    return Order(groups, channels, [(number, end) for _, number, end in blocks])


def _blocks(ascending: Tensor, scope: Scope, unit: int, floor: float) -> Iterator[tuple[tuple[float, float], int]]:
    """When the next channels of a group go, lowest first, and how many are gone then."""
    size = len(ascending)
    least = max(1, math.ceil(floor * size), min(size, unit))
    start = 0
    for kept in range((size - 1) // unit * unit, least - 1, -unit):
        end = size - kept
        importance = float(ascending[start:end].mean())
        yield ((end / size, importance) if scope == "layer" else (importance, end / size)), end
        start = end


def left(kind: str, graph: fx.GraphModule, order: Order, macs: Mapping[str, int]) -> list[float]:
    """Fraction of the cost that stays after each number of blocks, from none to all.

    Args:
        kind: of cost: `macs`, `parameters`, or `channels` of the groups.
        graph: the network before anything goes.
        order: of what goes.
        macs: of the network, by layer.
    """
    if kind == "channels":
        return _walked(order, sum(len(group.slices) for group in order.groups), lambda _number, gone: len(gone))
    layers = _layers(kind, graph, macs)
    total = sum(macs.values()) if kind == "macs" else sum(parameter.numel() for parameter in graph.parameters())
    taken = [[_taken(layers, cuts) for cuts in group.slices] for group in order.groups]

    def saved(number: int, gone: Sequence[int]) -> float:
        return sum(layer.saved_by(axis, places) for channel in gone for layer, axis, places in taken[number][channel])

    return _walked(order, total, saved)


def prices(kind: str, graph: fx.GraphModule, groups: Sequence[Group], macs: Mapping[str, int]) -> list[float]:
    """What a channel of each group costs, while all others are there; arguments as of `left`."""
    if kind == "channels":
        return [1.0] * len(groups)
    found: list[float] = []
    for group in groups:
        taken = _taken(_layers(kind, graph, macs), group.slices[0])
        found.append(sum(layer.saved_by(axis, places) for layer, axis, places in taken))
    return found


def _layers(kind: str, graph: fx.GraphModule, macs: Mapping[str, int]) -> dict[str, _Layer]:
    counted = kind == "macs"
    return {name: _Layer(module, macs.get(name, 0) if counted else None) for name, module in graph.named_modules()}


def _taken(layers: Mapping[str, _Layer], cuts: Sequence[Cut]) -> list[tuple[_Layer, str, int]]:
    """Layer, axis and number of places. Where a whole group of a convolution goes, its rows say it all."""
    return [
        (layers[cut.layer], cut.axis, len(cut.channels))
        for cut in cuts
        if cut.axis == "out" or (cut.axis == "in" and not layers[cut.layer].loses_groups(cut.channels))
    ]


def _walked(order: Order, total: float, saved: Callable[[int, Sequence[int]], float]) -> list[float]:
    """What stays of `total` after each number of blocks, where `saved` tells what channels of a group save."""
    stays, found, ends = total, [1.0], [0] * len(order.groups)
    for number, end in order.blocks:
        stays -= saved(number, order.channels[number][ends[number] : end])
        ends[number] = end
        found.append(stays / total)
    return found


class _Layer:
    """What a layer still costs, while places of it go: rows * columns of a matrix, and numbers for each row."""

    def __init__(self, module: nn.Module, macs: int | None) -> None:
        shapes = [parameter.shape for parameter in module.parameters(recurse=False)]
        matrices = [shape for shape in shapes if len(shape) > 1]
        self.groups = module.groups if isinstance(module, nn.Conv2d) else 1
        self.rows = shapes[0][0] if shapes else 0
        self.columns = matrices[0][1] * self.groups if matrices else 1
        if macs is not None:
            self.each, self.beside = macs / max(1, self.rows * self.columns), 0.0
        else:
            self.each = sum(math.prod(shape) for shape in matrices) / max(1, self.rows * self.columns)
            self.beside = float(sum(1 for shape in shapes if len(shape) == 1))

    def loses_groups(self, places: Sequence[int]) -> bool:
        """Whether columns are all those of some groups of a convolution, and not the same of every group."""
        width = self.columns // self.groups
        return self.groups > 1 and len({place // width for place in places}) < self.groups

    def saved_by(self, axis: str, places: int) -> float:
        """What goes with so many places, behind all that went before."""
        if axis == "in":
            self.columns -= places
            return self.each * self.rows * places
        self.rows -= places
        return (self.each * self.columns + self.beside) * places
