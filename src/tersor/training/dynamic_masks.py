"""Masks that a method renews every few steps from the magnitudes of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from tersor.graph.layer_selection import Layer
from tersor.pruning.topk import masks
from tersor.training.mask_attachment import MaskedAttachment, dense_weight
from tersor.training.objective import LossTerm
from tersor.training.schedule import interpolate


class DynamicSparsity(Protocol):
    """The parameters of a method with `DynamicMasks`.

    Attributes:
        sparsity: sparsity at the end of the stage.
        every: steps between two updates.
        end: fraction of the stage over which the sparsity rises.
        floor: fraction of each layer that always remains.
    """

    @property
    def sparsity(self) -> float: ...
    @property
    def every(self) -> int: ...
    @property
    def end(self) -> float: ...
    @property
    def floor(self) -> float: ...


class DynamicMasks(MaskedAttachment):
    """Global magnitude masks, renewed every few steps, in which masked weights can become active again.

    The sparsity rises along a cubic over the first part of the stage, and is constant afterwards.

    Args:
        model: the network.
        layers: the layers by name; each has a mask (`insert_masks`).
        method: sparsity, and how often it is updated.
        steps: number of steps of the stage.
        terms: losses that the method adds.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        method: DynamicSparsity,
        steps: int,
        terms: Sequence[LossTerm] = (),
    ) -> None:
        super().__init__(model, layers, updates=steps // method.every, terms=terms)
        self.method = method
        self.steps = self.scheduled_steps = steps
        self.ramp = max(1, round(method.end * steps))
        self.start = self.sparsity

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Update the masks every few steps until the end of the stage, and when the final sparsity is reached."""
        super().after_step(step, optimizer)
        done = step + 1
        if done % self.method.every == 0 or done == self.ramp:
            progress = min(1.0, done / self.ramp)
            sparsity = interpolate("cubic", progress, self.start, self.method.sparsity)
            self._update(sparsity, done, done // self.method.every)

    def finish(self) -> None:
        """Reach the exact sparsity, however few the steps were."""
        if round(self.sparsity * self.total) != round(self.method.sparsity * self.total):
            self._update(self.method.sparsity, self.steps, 0)
        super().finish()

    @torch.no_grad()
    def _update(self, sparsity: float, done: int, number: int) -> None:
        scores = {name: dense_weight(layer).detach().abs().flatten() for name, layer in self.masked.items()}
        shapes = {name: dense_weight(layer).shape for name, layer in self.masked.items()}
        self.set_masks(masks(scores, shapes, sparsity, "global", self.method.floor), done, number)
