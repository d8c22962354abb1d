"""A loss term whose weight rises linearly over the first steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.training.attachment import Attachment
from tersor.training.objective import LossTerm


class WarmupLossTerm(LossTerm):
    """A term that multiplies its loss by `warmup`, a buffer, so that checkpoints contain it."""

    warmup: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("warmup", torch.ones(()))


class WarmupAttachment(Attachment):
    """Raises the weight of a term linearly to 1.

    Args:
        model: the network.
        term: the term.
        steps: length of the warm-up; 0 for the full weight at once.
        label_weight: weight of the task's loss on the labels.
        layers: pairs of paths that the term needs.
    """

    def __init__(
        self,
        model: nn.Module,
        term: WarmupLossTerm,
        *,
        steps: int,
        label_weight: float,
        layers: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(model, [term], label_weight, layers=layers)
        self.term = term
        self.steps = self.scheduled_steps = steps
        self._set(0)

    def _set(self, step: int) -> None:
        self.term.warmup.fill_(min(1.0, (step + 1) / self.steps) if self.steps else 1.0)

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Set the weight for the next step."""
        super().after_step(step, optimizer)
        self._set(step + 1)
