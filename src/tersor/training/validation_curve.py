"""The metric on the validation images during training, measured without changing the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from tersor.core import distributed
from tersor.graph.eval_mode import evaluating
from tersor.training.ema import WeightEMA

_VALUES = "values"


class ValidationCurve:
    """The metric on the validation images every few steps.

    Measuring does not change the training: the network is in eval mode, so that running statistics and ranges do not
    change, and the random state is restored. With an EMA of the weights, the EMA is measured, since the training ends
    with it.

    Attributes:
        every: steps between two measurements.
        values: the scores so far, the same in every process.

    Args:
        every: 1 or more.
        measure: network in eval mode -> score. Only the first process calls it; the others wait.
    """

    def __init__(self, every: int, measure: Callable[[nn.Module], float]) -> None:
        assert every >= 1
        self.every = every
        self.values: list[float] = []
        self._measure = measure

    @property
    def steps(self) -> list[int]:
        """Number of finished steps at each measurement."""
        return [self.every * place for place in range(1, len(self.values) + 1)]

    @property
    def latest(self) -> dict[str, float]:
        """The latest score by its name in the progress; empty before the first measurement."""
        return {"validation": self.values[-1]} if self.values else {}

    def measure_if_due(self, done: int, model: nn.Module, ema: WeightEMA | None) -> None:
        """Measure if the number of `done` steps is a multiple of `every`."""
        if done % self.every:
            return
        score = 0.0
        if not distributed.rank():
            device = next(model.parameters()).device
            random_state = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
            with random_state, evaluating(model), ema.applied(model) if ema else nullcontext():
                score = self._measure(model)
        first, *_ = distributed.all_gather(torch.tensor(score, dtype=torch.float64))
        self.values.append(first.item())

    def measure_again(self, done: int, model: nn.Module) -> None:
        """Replace a measurement after `done` steps: the statistics of `model` have changed since."""
        if done % self.every == 0:
            del self.values[-1:]
            self.measure_if_due(done, model, None)

    def state(self) -> dict[str, Tensor]:
        """The state for the next process."""
        return {_VALUES: torch.tensor(self.values, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state()` of an earlier process; empty for a new curve."""
        self.values = state[_VALUES].tolist() if state else []
