"""Atoms that are the same and where they lie -> groups of channels that can go, and why the others stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tersor.pruning.dependency.propagation import ChannelPropagation, Place
from tersor.pruning.dependency.union_find import Ids


class Cut(NamedTuple):
    """Places that go.

    Attributes:
        layer: a layer, a parameter or buffer by its path, or a node of the graph.
        axis: `out` (filters and what hands channels on) or `in` (columns that read) of a layer; of a parameter the
            number of a dimension; `heads` of an attention; of a node `ARGUMENT=BEFORE`, which counts the places, or
            `gives=ARGUMENT`, of a sum that is one of its arguments from then on.
        channels: the places, as they were numbered before any of the cuts that are made at once.
    """

    layer: str
    axis: str
    channels: tuple[int, ...]


Unit = tuple[Cut, ...]

_bare = tuple.__new__


@dataclass(eq=False)
class Sorted:
    """Units that lie in the same places, the same number in each: one group of channels."""

    root: str
    roots: list[int]
    units: list[Unit]


def sort(walk: ChannelPropagation) -> tuple[list[Sorted], dict[str, str]]:
    """Groups in the order of the graph, and root -> why its channels stay."""
    kept = walk.atoms.kept()
    learned = {name for name, _ in walk.graph.named_parameters()}
    groups: dict[tuple[tuple[str, str, int], ...], Sorted] = {}
    whole: dict[str, str] = {}
    patterns: dict[bytes, _Pattern] = {}
    places = [(place, atoms) for place, atoms in walk.places.items() if atoms is not None]
    for root, lies, numbers in _lying(walk, [atoms for _, atoms in places]):
        pattern = patterns.get(lies.tobytes())
        if pattern is None:
            pattern = patterns[lies.tobytes()] = _pattern([places[each][0] for each in lies], learned)
        if not pattern.root:
            continue
        if root in kept:
            if pattern.written:  # places of a parameter that count pixels are no channels
                whole.setdefault(pattern.root, kept[root])
            continue
        group = groups.setdefault(pattern.signature, Sorted(pattern.root, [], []))
        group.roots.append(root)
        # a DenseNet has 97,000 of them, and `Cut(...)` takes more than twice as long
        group.units.append(
            tuple([_bare(Cut, (layer, axis, tuple(numbers[begin:end]))) for (layer, axis), begin, end in pattern.runs])
        )
    for group in groups.values():
        if len(group.units) == 1:
            whole.setdefault(group.root, "it has one channel")
    return [group for group in groups.values() if len(group.units) > 1], whole


def _lying(walk: ChannelPropagation, atoms: list[Ids]) -> Iterator[tuple[int, Ids, list[int]]]:
    """Roots in the order in which they are met; in which of the lists of atoms each lies, and at which numbers."""
    if not atoms:
        return
    roots = np.concatenate([walk.atoms.roots(each) for each in atoms])
    lists = np.repeat(np.arange(len(atoms)), [len(each) for each in atoms])
    numbers = np.concatenate([np.arange(len(each)) for each in atoms])
    together = np.argsort(roots, kind="stable")
    found, first, counts = np.unique(roots, return_index=True, return_counts=True)
    ends = np.cumsum(counts)
    for place in np.argsort(first):
        mine = together[ends[place] - counts[place] : ends[place]]
        yield int(found[place]), lists[mine], numbers[mine].tolist()


class _Pattern(NamedTuple):
    """What is the same for all atoms that lie in the same places.

    Attributes:
        root: the layer that writes them, or the parameter that holds them; empty for constants.
        written: whether a layer writes them.
        runs: each place with the part of the numbers that lie in it; arguments come last, since not all of a group need
            be counted by the same ones.
        signature: what a group has in common.
    """

    root: str
    written: bool
    runs: list[tuple[Place, int, int]]
    signature: tuple[tuple[str, str, int], ...]


def _pattern(found: list[Place], learned: set[str]) -> _Pattern:
    ends = {place: end for end, place in enumerate(found, 1)}  # the same place comes in a row
    begins = [0, *ends.values()]
    runs = [(place, begin, end) for (place, end), begin in zip(ends.items(), begins, strict=False)]
    runs.sort(key=lambda run: "=" in run[0][1])
    signature = tuple((*place, end - begin) for place, begin, end in runs if "=" not in place[1])
    return _Pattern(_root_name(found, learned), any(axis == "out" for _, axis in found), runs, signature)


def _root_name(places: list[Place], learned: set[str]) -> str:
    """The layer that writes the channels, or else the parameter that they lie in; empty for constants."""
    written = [name for name, axis in places if axis == "out"]
    held = [name for name, axis in places if axis.isdecimal() and name in learned]
    return (written or held or [""])[0]
