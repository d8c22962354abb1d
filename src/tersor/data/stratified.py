"""Stratified random splits, and generators seeded by several numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def generator(*numbers: int) -> torch.Generator:
    """Return a generator seeded by the `numbers`; neighboring seeds give unrelated streams."""
    # the count is included because a SeedSequence treats (1,) and (1, 0) alike
    state = np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def stratified(
    labels: Tensor, count: int, draw: torch.Generator, *, at_least: int = 0, leave: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw `count` indices, from every class in proportion to its size.

    Args:
        labels: (N,) class indices.
        count: number of indices to draw.
        draw: the source of random numbers.
        at_least: minimum to draw from every class that occurs.
        leave: minimum to leave of every class that occurs.

    Returns:
        Indices drawn (count,) and the others (N - count,), both in ascending order.
    """
    of_class = torch.bincount(labels)
    quota = torch.tensor(_quotas(of_class.tolist(), count, at_least, leave))
    shuffled = torch.randperm(len(labels), generator=draw)
    by_class = shuffled[torch.sort(labels[shuffled], stable=True).indices]
    first_of_class = of_class.cumsum(0) - of_class
    rank = torch.arange(len(labels)) - first_of_class[labels[by_class]]
    drawn = rank < quota[labels[by_class]]
    return by_class[drawn].sort().values, by_class[~drawn].sort().values


def _quotas(of_class: list[int], count: int, at_least: int, leave: int) -> list[int]:
    """Number to draw from each class, by largest remainder; ties go to the lower class index."""
    lowest = [min(at_least, n) for n in of_class]
    highest = [max(n - leave, 0) for n in of_class]
    assert sum(lowest) <= count <= sum(highest), "callers check this and raise InputError"
    share = [count * n / sum(of_class) for n in of_class]
    quota = [min(max(int(s), low), high) for s, low, high in zip(share, lowest, highest, strict=True)]
    classes = range(len(of_class))
    while sum(quota) < count:
        quota[max((c for c in classes if quota[c] < highest[c]), key=lambda c: share[c] - quota[c])] += 1
    while sum(quota) > count:
        quota[min((c for c in classes if quota[c] > lowest[c]), key=lambda c: share[c] - quota[c])] -= 1
    return quota
