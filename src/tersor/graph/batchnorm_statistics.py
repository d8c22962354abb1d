"""Moments of what reaches a BatchNorm, and statistics with which it answers as before though other moments reach it.

    y = gamma (x - mu) / u + beta,   u = sqrt(var + eps)
    u' = u s' / s,   mu' = m' - (m - mu) u' / u          m, s: mean and standard deviation before; m', s': now

Both are taken on the same images (of data that comes in the same order again), so that what sets these apart from those
of the training (no augmentation, few of them) cancels. With mu' = m', u' = s' it would stay, and be added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tersor.core.errors import InputError
from tersor.core.progress import NO_PROGRESS, ProgressReporter
from tersor.graph.batchnorm import Norm
from tersor.graph.eval_mode import evaluating, first_images
from tersor.graph.plain_modules import has_plain_forward

_NOTHING = 1e-6


@dataclass(frozen=True)
class Moments:
    """Of each channel, (C,): mean and standard deviation; behind a BatchNorm in its own unit, less its running mean."""

    mean: Tensor
    spread: Tensor

    def without(self, channels: Sequence[int]) -> Moments:
        """Of the other channels."""
        stays = torch.ones_like(self.mean, dtype=torch.bool)
        stays[list(channels)] = False
        return Moments(self.mean[stays], self.spread[stays])


def unit(norm: Norm) -> Tensor:
    """What a BatchNorm divides each channel by, (C,)."""
    assert norm.running_var is not None
    return (norm.running_var + norm.eps).sqrt()


def in_unit_of(found: Moments, norm: Norm) -> Moments:
    """The same in the BatchNorm's unit."""
    assert norm.running_mean is not None
    return Moments((found.mean - norm.running_mean) / unit(norm), found.spread / unit(norm))


@torch.no_grad()
def fit(norm: Norm, found: Moments, wanted: Moments, *, spreads: bool) -> None:
    """Sets running statistics so that what comes has the moments that were wanted, in their unit."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    divisor = unit(norm)
    if spreads:
        alive = (wanted.spread > _NOTHING) & (found.spread > _NOTHING * divisor)
        divisor = torch.where(alive, found.spread / wanted.spread.clamp(min=_NOTHING), divisor)
        norm.running_var.copy_((divisor.square() - norm.eps).clamp(min=0))
    norm.running_mean.copy_(found.mean - wanted.mean * divisor)


def with_statistics(graph: fx.GraphModule) -> dict[str, Norm]:
    """The BatchNorms that have running statistics, and torch's own forward, which moves them."""
    return {
        name: module
        for name, module in graph.named_modules()
        if isinstance(module, Norm) and module.track_running_stats
        if module.running_mean is not None and has_plain_forward(module)
    }


def moments_of_batches(
    graph: fx.GraphModule, data: Iterable[Any], images: int, progress: ProgressReporter = NO_PROGRESS
) -> dict[str, Moments]:
    """BatchNorm -> moments of what reaches it, averaged over the batches, each BatchNorm before it normalising by its
    batch; the network comes back as it was.

    Raises:
        InputError: no batch has two images.
    """
    norms, done = with_statistics(graph), 0
    found: dict[str, Moments] = {}
    if not norms:
        return found
    kept = {name: {key: value.clone() for key, value in norm.named_buffers()} for name, norm in norms.items()}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    progress.start("BatchNorm statistics", images)
    try:
        with evaluating(graph):
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None  # the average of all batches
                norm.train()
            for some in first_images(data, images, next(graph.parameters()).device):
                if len(some) < 2:
                    break
                with torch.no_grad():
                    graph(some)
                done += len(some)
                progress.advance(len(some))
        for name, norm in norms.items():
            assert norm.running_mean is not None
            assert norm.running_var is not None
            found[name] = Moments(norm.running_mean.clone(), norm.running_var.sqrt())
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
            for key, value in norm.named_buffers():
                value.copy_(kept[name][key])
    if not done:
        raise InputError("BatchNorm's statistics need batches of at least two images. Pass data=... with such.")
    return found
