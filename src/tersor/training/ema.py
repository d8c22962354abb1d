"""Exponential moving average (EMA) of a model's weights."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightEMA:
    """EMA of every parameter and of BatchNorm's statistics: `average = decay * average + (1 - decay) * weight`.

    The decay is at most (1 + step) / (10 + step), as in TensorFlow's ExponentialMovingAverage, so that the initial
    weights fade in a short training run too. Other buffers (masks, scales, ranges) are not averaged.

    Attributes:
        averages: the averages by name. The step is passed to `update`, so they are the whole state.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.averages = {name: tensor.detach().clone() for name, tensor in _averaged(model)}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the averages with the weights after `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in _averaged(model):
            self.averages[name].lerp_(tensor, 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Replace the weights of `model` by the averages."""
        for name, tensor in _averaged(model):
            tensor.copy_(self.averages[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Generator[None]:
        """Context in which `model` has the averages as its weights; its own are restored exactly."""
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
