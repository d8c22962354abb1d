"""What the loop takes its batches from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from tersor.core.objective import Batch


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
