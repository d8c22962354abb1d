"""Sets of coupled channels: a union-find over channel ids, one id for each index of each dimension of a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class TrackedShape:
    """The shape of a tensor, and for each dimension the channel ids along it; None where nothing can be removed."""

    shape: tuple[int, ...]
    ids: tuple[Ids | None, ...]

    @staticmethod
    def frozen(shape: Sequence[int]) -> TrackedShape:
        """A tensor of which nothing can be removed."""
        return TrackedShape(tuple(shape), (None,) * len(shape))


class ChannelSets:
    """A union-find over channel ids, and the reasons why some sets are frozen, that is, cannot be removed."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._flat: Ids | None = None
        self._frozen: list[tuple[Ids, str]] = []

    def new(self, count: int) -> Ids:
        """`count` ids, each a set of its own."""
        start, self._flat = len(self._parents), None
        self._parents.extend(range(start, start + count))
        return np.arange(start, start + count)

    def find(self, channel: int) -> int:
        """The representative of the set of `channel`."""
        parents = self._parents
        while parents[channel] != channel:
            parents[channel] = parents[parents[channel]]
            channel = parents[channel]
        return channel

    def find_all(self, ids: Ids) -> Ids:
        """The representatives of all `ids`."""
        if self._flat is None:  # for all ids at once, valid until the next union
            flat = np.array(self._parents, np.int64)
            while not np.array_equal(flat, above := flat[flat]):
                flat = above
            self._flat = flat
        return self._flat[ids]

    def outside(self, representatives: Iterable[int]) -> NDArray[np.bool_]:
        """For every id, whether it is outside of these sets."""
        inside = np.fromiter(representatives, np.int64)
        return ~np.isin(self.find_all(np.arange(len(self._parents))), inside)

    def union(self, first: Ids, second: Ids) -> None:
        """Join the sets of the ids at each index."""
        if first is second or np.array_equal(first, second):
            return
        self._flat = None
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            a, b = self.find(one), self.find(other)
            if a != b:
                self._parents[max(a, b)] = min(a, b)

    def freeze(self, ids: Ids | None, reason: str) -> None:
        """Forbid the removal of all `ids`."""
        if ids is not None and len(ids):
            self._frozen.append((ids, reason))

    def couple(self, first: Ids | None, second: Ids | None, reason: str) -> Ids | None:
        """Join two views of the same dimension. If one has a fixed size, freeze the other."""
        if first is None or second is None:
            self.freeze(first, reason)
            self.freeze(second, reason)
            return None
        self.union(first, second)
        return first

    def frozen(self) -> dict[int, str]:
        """Representative -> the first reason why its set is frozen."""
        reasons: dict[int, str] = {}
        for ids, reason in self._frozen:
            for representative in np.unique(self.find_all(ids)).tolist():
                reasons.setdefault(representative, reason)
        return reasons
