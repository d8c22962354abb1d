"""Coupled channel ids -> groups of channels that can be removed, and the reasons why others cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tersor.pruning.dependency.propagation import ChannelPropagation, PrunableAxis
from tersor.pruning.dependency.union_find import Ids


class Cut(NamedTuple):
    """Channels to remove along one axis.

    Attributes:
        layer: a layer, a parameter or buffer by its path, or a node of the graph.
        axis: for a layer, `out` (filters, per-channel parameters) or `in` (the columns that read the channels). For a
            parameter, the number of the dimension. For a node with an argument that is the number of channels,
            `ARGUMENT=BEFORE`, where BEFORE is the old number. For a sum that is replaced with one of its operands,
            `gives=ARGUMENT`.
        channels: indices in the network before this round of cuts.
    """

    layer: str
    axis: str
    channels: tuple[int, ...]


CoupledSlices = tuple[Cut, ...]
"""Everything that is removed with one channel."""

_Signature = tuple[tuple[str, str, int], ...]

_bare = tuple.__new__


@dataclass(eq=False)
class ChannelGroup:
    """Channels whose slices have the same layers, axes and sizes, in the same parts of splits.

    Attributes:
        root: the layer that produces the channels.
        representatives: representatives of the channel sets.
        slices: slices of every channel.
    """

    root: str
    representatives: list[int]
    slices: list[CoupledSlices]


def find_groups(propagation: ChannelPropagation) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Groups in the order of the graph, and root -> why its channels cannot be removed."""
    frozen = propagation.sets.frozen()
    learned = {name for name, _ in propagation.graph.named_parameters()}
    groups: dict[tuple[_Signature, tuple[int, ...]], ChannelGroup] = {}
    unprunable: dict[str, str] = {}
    patterns: dict[bytes, _Pattern] = {}
    parts = _parts(propagation)
    axes = [(axis, ids) for axis, ids in propagation.axes.items() if ids is not None]
    for representative, members, indices in _occurrences(propagation, [ids for _, ids in axes]):
        pattern = patterns.get(members.tobytes())
        if pattern is None:
            pattern = patterns[members.tobytes()] = _pattern([axes[each][0] for each in members], learned)
        if not pattern.root:
            continue
        if representative in frozen:
            if pattern.written:  # axes of a parameter that count pixels are not channels
                unprunable.setdefault(pattern.root, frozen[representative])
            continue
        same = (pattern.signature, parts.get(representative, ()))
        group = groups.setdefault(same, ChannelGroup(pattern.root, [], []))
        group.representatives.append(representative)
        # a DenseNet has 97,000 of them, and `Cut(...)` takes more than twice as long
        group.slices.append(
            tuple([_bare(Cut, (layer, axis, tuple(indices[begin:end]))) for (layer, axis), begin, end in pattern.runs])
        )
    for group in groups.values():
        if len(group.slices) == 1:
            reason = "each of them is used in a different way, and at least one channel per use has to remain"
            unprunable.setdefault(group.root, reason)
    return [group for group in groups.values() if len(group.slices) > 1], unprunable


def _parts(propagation: ChannelPropagation) -> dict[int, tuple[int, ...]]:
    """Channel set -> the parts of splits that contain it."""
    found: dict[int, tuple[int, ...]] = {}
    for number, ids in enumerate(propagation.parts):
        for representative in np.unique(propagation.sets.find_all(ids)).tolist():
            found[representative] = (*found.get(representative, ()), number)
    return found


def _occurrences(propagation: ChannelPropagation, axes: list[Ids]) -> Iterator[tuple[int, Ids, list[int]]]:
    """Every channel set in the order of its first occurrence: representative, numbers of its axes, indices there."""
    if not axes:
        return
    representatives = np.concatenate([propagation.sets.find_all(each) for each in axes])
    numbers = np.repeat(np.arange(len(axes)), [len(each) for each in axes])
    indices = np.concatenate([np.arange(len(each)) for each in axes])
    by_set = np.argsort(representatives, kind="stable")
    unique, first, counts = np.unique(representatives, return_index=True, return_counts=True)
    ends = np.cumsum(counts)
    for place in np.argsort(first):
        members = by_set[ends[place] - counts[place] : ends[place]]
        yield int(unique[place]), numbers[members], indices[members].tolist()


class _Pattern(NamedTuple):
    """What all channel sets on the same axes share.

    Attributes:
        root: the layer that produces them, or the parameter that holds them; empty for constants.
        written: whether a layer writes them.
        runs: each axis with the range of the indices on it; arguments come last, since not all channels of a group
            need be counted by the same ones.
        signature: what all channels of a group have in common.
    """

    root: str
    written: bool
    runs: list[tuple[PrunableAxis, int, int]]
    signature: _Signature


def _pattern(axes: list[PrunableAxis], learned: set[str]) -> _Pattern:
    ends = {axis: end for end, axis in enumerate(axes, 1)}  # equal axes are neighbors
    begins = [0, *ends.values()]
    runs = [(axis, begin, end) for (axis, end), begin in zip(ends.items(), begins, strict=False)]
    runs.sort(key=lambda run: "=" in run[0][1])
    signature = tuple((*axis, end - begin) for axis, begin, end in runs if "=" not in axis[1])
    written = [name for name, axis in axes if axis == "out"]
    held = [name for name, axis in axes if axis.isdecimal() and name in learned]
    return _Pattern((written or held or [""])[0], bool(written), runs, signature)
