"""What a network is worth while it trains: measured every few steps, in a way that leaves the training as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from tersor.core import distributed
from tersor.graph.eval_mode import evaluating
from tersor.training.ema import RunningMean

_VALUES = "values"


class AccuracyCurve:
    """Percent of right answers after every few steps of a training.

    The network is looked at in eval, so that no running statistic and no range moves, and the random numbers go on as
    if nothing had been drawn: the training is bit-equal to one that nobody looks at. Where the weights have a running
    mean, that is measured, since it is what the training leaves.

    Attributes:
        every: steps between two measurements.
        values: in percent, one for each measurement so far; the same in every process.

    Args:
        every: 1 or more.
        measure: the network, in eval -> percent. Of several processes the first calls it, and the others wait.
    """

    def __init__(self, every: int, measure: Callable[[nn.Module], float]) -> None:
        assert every >= 1
        self.every = every
        self.values: list[float] = []
        self._measure = measure

    @property
    def steps(self) -> list[int]:
        """How many steps were done at each measurement."""
        return [self.every * place for place in range(1, len(self.values) + 1)]

    @property
    def latest(self) -> dict[str, float]:
        """What to show beside the losses; nothing before the first measurement."""
        return {"validation": self.values[-1]} if self.values else {}

    def go_on(self, kept: Mapping[str, Tensor]) -> None:
        """Takes back what `tensors` gave to the process before."""
        self.values = kept[_VALUES].tolist() if kept else []

    def after(self, done: int, model: nn.Module, mean: RunningMean | None) -> None:
        """Measures where it is due, after `done` steps."""
        if done % self.every:
            return
        percent = 0.0
        if not distributed.rank():
            device = next(model.parameters()).device
            drawn = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
            with drawn, evaluating(model), mean.shown(model) if mean else nullcontext():
                percent = self._measure(model)
        first, *_ = distributed.all_gather(torch.tensor(percent, dtype=torch.float64))
        self.values.append(first.item())

    def tensors(self) -> dict[str, Tensor]:
        """For the next process."""
        return {_VALUES: torch.tensor(self.values, dtype=torch.float64)}
