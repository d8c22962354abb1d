"""The exponential running mean of a model's weights (EMA)."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class RunningMean:
    """Running mean of every parameter and of BatchNorm's statistics: `mean = decay * mean + (1 - decay) * weight`.

    The decay is at most (1 + step) / (10 + step), as in TensorFlow's ExponentialMovingAverage: the weights that
    training began with fade in a short run too. Other buffers (masks, scales, ranges) have no mean and stay alone.

    Attributes:
        values: the means by name. The loop says which step it is, so they are the whole state.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: tensor.detach().clone() for name, tensor in _averaged(model)}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the weights that `step` (from 0) has led to."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in _averaged(model):
            self.values[name].lerp_(tensor, 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Gives `model` the means as its weights."""
        for name, tensor in _averaged(model):
            tensor.copy_(self.values[name])

    @contextmanager
    def shown(self, model: nn.Module) -> Generator[None]:
        """While `model` has the means as its weights; afterwards it has its own again, bit for bit."""
        own = {name: tensor.detach().clone() for name, tensor in _averaged(model)}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in _averaged(model):
                    tensor.copy_(own[name])


def _averaged(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            yield name, buffer
