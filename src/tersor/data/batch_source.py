"""Sources of batches for the training loop, and groups of batches for gradient accumulation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from tersor.data.batch import Batch


class BatchSource(Protocol):
    """Batches of one epoch at a time, such as `tersor.data.Batches`."""

    def __len__(self) -> int:
        """Number of batches per epoch."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches of the selected epoch."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration."""
        ...


@dataclass(frozen=True)
class Group:
    """The `size` batches of one optimizer step; `first` is whether it is the first step of an epoch."""

    batches: Iterator[Batch]
    size: int
    first: bool


def batches_in(groups: int, batches: BatchSource, accumulate: int) -> int:
    """Number of batches in the first `groups` groups: the last group of an epoch may be smaller."""
    epochs, rest = divmod(groups, math.ceil(len(batches) / accumulate))
    return epochs * len(batches) + rest * accumulate


def groups(batches: BatchSource, accumulate: int, first: int) -> Iterator[Group]:
    """Yield groups of `accumulate` batches, epoch after epoch without end, starting at group number `first`."""
    per_epoch = math.ceil(len(batches) / accumulate)
    for epoch in itertools.count(first // per_epoch):
        batches.set_epoch(epoch)
        skipped = first % per_epoch * accumulate if epoch == first // per_epoch else 0
        source = itertools.islice(batches, skipped, None)
        for start in range(skipped, len(batches), accumulate):
            size = min(accumulate, len(batches) - start)
            yield Group(itertools.islice(source, size), size, first=start == 0)
