"""What the loop takes its batches from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from tersor.data.batch import Batch


class BatchSource(Protocol):
    """Batches that can be gone through epoch by epoch, such as `tersor.data.Batches`."""

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the epoch that was set last."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Decides the order of what `iter` gives next."""
        ...


@dataclass(frozen=True)
class Group:
    """The `size` batches of one step, which may be the first of an epoch."""

    batches: Iterator[Batch]
    size: int
    first: bool


def groups(batches: BatchSource, accumulate: int, first: int) -> Iterator[Group]:
    """The groups of epoch after epoch, without end, from the group number `first` on."""
    of_epoch = math.ceil(len(batches) / accumulate)
    for epoch in itertools.count(first // of_epoch):
        batches.set_epoch(epoch)
        passed = first % of_epoch * accumulate if epoch == first // of_epoch else 0
        source = itertools.islice(batches, passed, None)
        for start in range(passed, len(batches), accumulate):
            size = min(accumulate, len(batches) - start)
            yield Group(itertools.islice(source, size), size, first=start == 0)
