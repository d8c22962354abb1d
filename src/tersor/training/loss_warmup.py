"""A loss whose weight rises over the first steps: a student that knows nothing yet learns the labels first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.training.attachment import Attachment
from tersor.training.objective import LossTerm


class WarmupLossTerm(LossTerm):
    """One that multiplies its loss by `rise`, a buffer, so that a run that goes on has it."""

    rise: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rise", torch.ones(()))


class RisingAttachment(Attachment):
    """Lets the weight of a term rise linearly to 1.

    Args:
        model: the network.
        term: what rises.
        steps: over which it does; 0 for the whole weight at once.
        label_weight: factor on the weight of the labels' own loss.
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
        self.steps = steps
        self._set(0)

    def _set(self, step: int) -> None:
        self.term.rise.fill_(min(1.0, (step + 1) / self.steps) if self.steps else 1.0)

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """The weight of the next step."""
        self._set(step + 1)
