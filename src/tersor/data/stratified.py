"""Sets cut from others: in proportion to the classes, and drawn from generators of their own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def generator(*numbers: int) -> torch.Generator:
    """A generator that the `numbers` alone decide; neighbouring ones give unrelated streams."""
    # with their count, because a SeedSequence does not tell (1,) from (1, 0)
    state = np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def stratified(
    labels: Tensor, count: int, draw: torch.Generator, *, at_least: int = 0, leave: int = 0
) -> tuple[Tensor, Tensor]:
    """Draws `count` places, of every class in proportion.

    Args:
        labels: (N,) class numbers.
        count: how many to draw.
        draw: where the random numbers come from.
        at_least: how many of every class that occurs are drawn.
        leave: how many of every class that occurs are left.

    Returns:
        Places drawn (count,) and places left (N - count,), both in rising order.
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
    """How many to draw of each class: largest remainders first, ties by class number."""
    lowest = [min(at_least, n) for n in of_class]
    highest = [max(n - leave, 0) for n in of_class]
    assert sum(lowest) <= count <= sum(highest), "the caller says to the user what is impossible"
    share = [count * n / sum(of_class) for n in of_class]
    quota = [min(max(int(s), low), high) for s, low, high in zip(share, lowest, highest, strict=True)]
    classes = range(len(of_class))
    while sum(quota) < count:
        quota[max((c for c in classes if quota[c] < highest[c]), key=lambda c: share[c] - quota[c])] += 1
    while sum(quota) > count:
        quota[min((c for c in classes if quota[c] > lowest[c]), key=lambda c: share[c] - quota[c])] -= 1
    return quota
