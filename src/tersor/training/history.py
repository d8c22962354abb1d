"""What a training has lost and how long it took, also over several processes of which each went on from the last."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

_SECONDS = "seconds"


class LossLog:
    """Losses of the epoch that was begun last, and the clock.

    Attributes:
        earlier: seconds that processes before this one took.

    Args:
        kept: what `tensors` gave to the process before; empty at the beginning.
    """

    def __init__(self, kept: Mapping[str, Tensor]) -> None:
        self.earlier = float(kept.get(_SECONDS, 0.0))
        self._of_epoch = {name: list(values) for name, values in kept.items() if name != _SECONDS}
        self._begun = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the first step of the first process, without what was `paused`."""
        return self.earlier + time.perf_counter() - self._begun

    @contextmanager
    def paused(self) -> Generator[None]:
        """The clock stands still: what is done here is no training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._begun += time.perf_counter() - began

    def add(self, losses: Mapping[str, Tensor], *, first: bool) -> None:
        """Of one step, which may be the first of an epoch."""
        if first:
            self._of_epoch.clear()
        for name, loss in losses.items():
            self._of_epoch.setdefault(name, []).append(loss)

    def means(self) -> dict[str, float]:
        """Of each loss over the epoch that was begun last."""
        return {name: torch.stack(values).mean().item() for name, values in self._of_epoch.items()}

    def tensors(self) -> dict[str, Tensor]:
        """For the next process."""
        told = {name: torch.stack(values).cpu() for name, values in self._of_epoch.items()}
        return {**told, _SECONDS: torch.tensor(self.seconds)}
