"""Atoms: the smallest things that can go from a network, one for each place of a dimension, and which are the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Labelled:
    """A tensor: its sizes, and for each dimension an atom for every place, or None where nothing can go."""

    shape: tuple[int, ...]
    atoms: tuple[Ids | None, ...]

    @staticmethod
    def fixed(shape: Sequence[int]) -> Labelled:
        """A tensor of which nothing can go."""
        return Labelled(tuple(shape), (None,) * len(shape))


class Atoms:
    """A union-find over atoms, and why some of them have to stay."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._flat: Ids | None = None
        self._kept: list[tuple[Ids, str]] = []

    def new(self, count: int) -> Ids:
        """`count` atoms that belong to nothing yet."""
        start, self._flat = len(self._parents), None
        self._parents.extend(range(start, start + count))
        return np.arange(start, start + count)

    def root(self, atom: int) -> int:
        """The one that stands for all that are the same as `atom`."""
        parents = self._parents
        while parents[atom] != atom:
            parents[atom] = parents[parents[atom]]
            atom = parents[atom]
        return atom

    def roots(self, atoms: Ids) -> Ids:
        """The root of each."""
        if self._flat is None:  # all at once, until the next two are united
            flat = np.array(self._parents, np.int64)
            while not np.array_equal(flat, above := flat[flat]):
                flat = above
            self._flat = flat
        return self._flat[atoms]

    def outside(self, roots: Iterable[int]) -> NDArray[np.bool_]:
        """For every atom, whether its root is none of these."""
        inside = np.fromiter(roots, np.int64)
        return ~np.isin(self.roots(np.arange(len(self._parents))), inside)

    def unite(self, first: Ids, second: Ids) -> None:
        """Place by place, the two are the same."""
        if first is second or np.array_equal(first, second):
            return
        self._flat = None
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            a, b = self.root(one), self.root(other)
            if a != b:
                self._parents[max(a, b)] = min(a, b)

    def keep(self, atoms: Ids | None, why: str) -> None:
        """All of `atoms` stay."""
        if atoms is not None and len(atoms):
            self._kept.append((atoms, why))

    def match(self, first: Ids | None, second: Ids | None, why: str) -> Ids | None:
        """The same dimension, seen twice; where nothing of one can go, nothing of the other can."""
        if first is None or second is None:
            self.keep(first, why)
            self.keep(second, why)
            return None
        self.unite(first, second)
        return first

    def kept(self) -> dict[int, str]:
        """Root -> the first reason why it stays."""
        found: dict[int, str] = {}
        for atoms, why in self._kept:
            for root in np.unique(self.roots(atoms)).tolist():
                found.setdefault(root, why)
        return found
