"""Losses and wall time of a training run, across the processes of a resumed one."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

_SECONDS = "seconds"


class LossHistory:
    """Losses of the current epoch, and the clock.

    Attributes:
        earlier_seconds: seconds that earlier processes of this training run took.

    Args:
        state: `state()` of the earlier process; empty for a new training run.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.earlier_seconds = float(state.get(_SECONDS, 0.0))
        self._losses = {name: list(values) for name, values in state.items() if name != _SECONDS}
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the first step of the first process, without those spent in `paused`."""
        return self.earlier_seconds + time.perf_counter() - self._start

    @contextmanager
    def paused(self) -> Generator[None]:
        """Stop the clock, for work that is not training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    def add(self, losses: Mapping[str, Tensor], *, first: bool) -> None:
        """Add the losses of one step, the `first` of an epoch or a later one."""
        if first:
            self._losses.clear()
        for name, loss in losses.items():
            self._losses.setdefault(name, []).append(loss)

    def means(self) -> dict[str, float]:
        """Mean of each loss over the current epoch."""
        return {name: torch.stack(values).mean().item() for name, values in self._losses.items()}

    def state(self) -> dict[str, Tensor]:
        """The state for the next process."""
        losses = {name: torch.stack(values).cpu() for name, values in self._losses.items()}
        return {**losses, _SECONDS: torch.tensor(self.seconds)}
