"""Atoms that are the same and where they lie -> groups of channels that can go, and why the others stay."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from tersor.graph.coupling.walk import Place, Walk


class Cut(NamedTuple):
    """Places that go.

    Attributes:
        layer: a layer, a parameter or buffer by its path, or a node of the graph.
        axis: `out` (filters and what hands channels on) or `in` (columns that read) of a layer; of a parameter the
            number of a dimension; `heads` of an attention; of a node `ARGUMENT=BEFORE`, which counts the places.
        channels: the places, as they were numbered before any of the cuts that are made at once.
    """

    layer: str
    axis: str
    channels: tuple[int, ...]


Unit = tuple[Cut, ...]


@dataclass(eq=False)
class Sorted:
    """Units that lie in the same places, the same number in each: one group of channels."""

    root: str
    roots: list[int]
    units: list[Unit]


def sort(walk: Walk) -> tuple[list[Sorted], dict[str, str]]:
    """Groups in the order of the graph, and root -> why its channels stay."""
    lies: defaultdict[int, list[tuple[Place, int]]] = defaultdict(list)
    for place, atoms in walk.places.items():
        if atoms is not None:
            for number, root in enumerate(walk.atoms.roots(atoms).tolist()):
                lies[root].append((place, number))
    kept = walk.atoms.kept()
    learned = {name for name, _ in walk.graph.named_parameters()}
    groups: dict[tuple[tuple[str, str, int], ...], Sorted] = {}
    whole: dict[str, str] = {}
    for root, found in lies.items():
        name = _root_name([place for place, _ in found], learned)
        if not name:
            continue
        if root in kept:
            if any(axis == "out" for (_, axis), _ in found):  # places of a parameter that count pixels are no channels
                whole.setdefault(name, kept[root])
            continue
        unit = _unit(found)
        signature = tuple((cut.layer, cut.axis, len(cut.channels)) for cut in unit if "=" not in cut.axis)
        group = groups.setdefault(signature, Sorted(name, [], []))
        group.roots.append(root)
        group.units.append(unit)
    for group in groups.values():
        if len(group.units) == 1:
            whole.setdefault(group.root, "it has one channel")
    return [group for group in groups.values() if len(group.units) > 1], whole


def _root_name(places: list[Place], learned: set[str]) -> str:
    """The layer that writes the channels, or else the parameter that they lie in; empty for constants."""
    written = [name for name, axis in places if axis == "out"]
    held = [name for name, axis in places if axis.isdecimal() and name in learned]
    return (written or held or [""])[0]


def _unit(found: list[tuple[Place, int]]) -> Unit:
    """One cut for each place; arguments come last, since not all of a group need be counted by the same ones."""
    numbers: dict[Place, list[int]] = {}
    for place, number in found:
        numbers.setdefault(place, []).append(number)
    cuts = [Cut(name, axis, tuple(chosen)) for (name, axis), chosen in numbers.items()]
    return tuple(sorted(cuts, key=lambda cut: "=" in cut.axis))
