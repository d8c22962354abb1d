"""Which channels go, in which order, and what is left after each.

Channels go in blocks, since runtimes compute ragged widths slowly: what stays of a group is a multiple of `round_to`.
What a block saves is counted from what it takes of each layer, so that the whole order costs one walk over the blocks
and not one over the network for each of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, fx
from torch.nn.utils import parametrize

from tersor.core.errors import InputError
from tersor.core.parametrization import FakeQuantize
from tersor.core.selection import matching
from tersor.graph.channels import Cut, Group, coupled_channels, merged

Scope = Literal["layer", "global"]


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
        InputError: masks or grids lie on the network, a pattern matches nothing, no channel can be removed.
    """
    for name, module in graph.named_modules():
        if isinstance(module, FakeQuantize) or parametrize.is_parametrized(module):
            raise InputError(
                f"{name or 'the network'} lies under a mask or a grid already, and channels are removed before. "
                f"Write {method} in a stage before weight_pruning, ptq and qat."
            )
    excluded = matching(exclude, [name for name, _ in graph.named_modules() if name]) if exclude else set[str]()
    groups, whole = coupled_channels(graph, example)
    chosen = [
        group for group in groups if not any(cut.layer in excluded for cut in group.slices[0] if cut.axis == "out")
    ]
    if not chosen:
        raise InputError(
            f"no channel of {type(graph).__name__} can be removed. Possible: weight_pruning, which masks"
            + (", or a shorter `exclude`." if exclude else ".")
        )
    return chosen, whole


def ordered(
    groups: Sequence[Group], importances: Sequence[Tensor], *, scope: Scope, round_to: int, floor: float
) -> Order:
    """The order in which channels go.

    Args:
        groups: of coupled channels.
        importances: of every group (channels,).
        scope: `layer`: next is a block of the group that has lost the smallest fraction; `global`: the block of the
            lowest mean importance, among all groups.
        round_to: places of the layer that produces them, of which a multiple stays.
        floor: fraction of a group that always stays.
    """
    blocks = sorted(
        (priority, number, end)
        for number, (group, scores) in enumerate(zip(groups, importances, strict=True))
        for priority, end in _blocks(scores.sort().values, scope, _unit(group, round_to), floor)
    )
    channels = [scores.argsort(stable=True).tolist() for scores in importances]
    return Order(groups, channels, [(number, end) for _, number, end in blocks])


def _unit(group: Group, round_to: int) -> int:
    """Channels of which a multiple stays: a head of 64 places is round enough by itself."""
    places = next((len(cut.channels) for cut in group.slices[0] if cut.layer == group.root), 1)
    return round_to // math.gcd(round_to, places)


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
        return _walked(order, sum(len(group.slices) for group in order.groups), lambda _cuts, count: count)
    layers = _Layers(kind, graph, macs)
    total = sum(macs.values()) if kind == "macs" else sum(parameter.numel() for parameter in graph.parameters())
    return _walked(order, total, lambda cuts, _count: layers.saved_by(cuts))


def _walked(order: Order, total: float, saved: Callable[[Sequence[Cut], int], float]) -> list[float]:
    """What stays of `total` after each number of blocks, where `saved` tells what cuts of so many channels save."""
    stays, found, ends = total, [1.0], [0] * len(order.groups)
    for number, end in order.blocks:
        gone = order.channels[number][ends[number] : end]
        cuts = [cut for channel in gone for cut in order.groups[number].slices[channel]]
        stays -= saved(cuts, len(gone))
        ends[number] = end
        found.append(stays / total)
    return found


class _Layers:
    """What the layers of a network still cost, while places of them go."""

    def __init__(self, kind: str, graph: fx.GraphModule, macs: Mapping[str, int]) -> None:
        self._macs = macs if kind == "macs" else None
        self._shapes = {
            name: [tuple(parameter.shape) for parameter in module.parameters(recurse=False)]
            for name, module in graph.named_modules()
        }
        self._lost: dict[str, Counter[str]] = {}

    def saved_by(self, cuts: Sequence[Cut]) -> float:
        """What goes with `cuts`, behind all that went before."""
        touched = {cut.layer for cut in cuts if self._shapes.get(cut.layer)}
        before = sum(map(self._cost, touched))
        for cut in cuts:
            self._lost.setdefault(cut.layer, Counter())[cut.axis] += len(cut.channels)
        return before - sum(map(self._cost, touched))

    def _cost(self, name: str) -> float:
        shapes, lost = self._shapes[name], self._lost.get(name, Counter[str]())
        rows = 1 - lost["out"] / shapes[0][0]
        columns = 1 - lost["in"] / shapes[0][1] if len(shapes[0]) > 1 else 1.0
        if self._macs is not None:
            return self._macs.get(name, 0) * rows * columns
        return sum(math.prod(shape) * rows * (columns if len(shape) > 1 else 1) for shape in shapes)
