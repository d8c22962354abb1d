"""Moments of BatchNorm inputs, and running statistics that compensate for a change of these moments.

    y = gamma (x - mu) / u + beta,   u = sqrt(var + eps)
    u' = u s' / s,   mu' = m' - (m - mu) u' / u          m, s: mean and standard deviation before; m', s': after

Both moments are taken on the same images in the same order. So the difference between these and the training images (no
augmentation, few images) cancels, whereas mu' = m', u' = s' would add it.
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
from tersor.graph.forward_call import run
from tersor.graph.plain_modules import has_plain_forward

_NOTHING = 1e-6


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of each channel, (C,), possibly normalized by a BatchNorm (`in_unit_of`)."""

    mean: Tensor
    std: Tensor

    def without(self, channels: Sequence[int]) -> Moments:
        """The moments of the other channels."""
        remaining = torch.ones_like(self.mean, dtype=torch.bool)
        remaining[list(channels)] = False
        return Moments(self.mean[remaining], self.std[remaining])


def unit(norm: Norm) -> Tensor:
    """The divisor of each channel in a BatchNorm, (C,)."""
    assert norm.running_var is not None
    return (norm.running_var + norm.eps).sqrt()


def in_unit_of(found: Moments, norm: Norm) -> Moments:
    """The moments after subtracting the running mean and dividing by the BatchNorm's `unit`."""
    assert norm.running_mean is not None
    return Moments((found.mean - norm.running_mean) / unit(norm), found.std / unit(norm))


@torch.no_grad()
def fit(norm: Norm, found: Moments, expected: Moments, *, variances: bool) -> None:
    """Set running statistics, so that inputs with moments `found` are normalized to moments `expected`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    divisor = unit(norm)
    if variances:
        alive = (expected.std > _NOTHING) & (found.std > _NOTHING * divisor)
        divisor = torch.where(alive, found.std / expected.std.clamp(min=_NOTHING), divisor)
        norm.running_var.copy_((divisor.square() - norm.eps).clamp(min=0))
    norm.running_mean.copy_(found.mean - expected.mean * divisor)


def with_statistics(graph: fx.GraphModule) -> dict[str, Norm]:
    """The BatchNorms with running statistics and torch's own forward method, which updates them."""
    return {
        name: module
        for name, module in graph.named_modules()
        if isinstance(module, Norm) and module.track_running_stats
        if module.running_mean is not None and has_plain_forward(module)
    }


def moments_of_batches(
    graph: fx.GraphModule, data: Iterable[Any], images: int, progress: ProgressReporter = NO_PROGRESS
) -> dict[str, Moments]:
    """BatchNorm -> moments of its input, averaged over batches, while all BatchNorms normalize by batch statistics.

    The network is restored afterwards.

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
                    run(graph, some)
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
        raise InputError("BatchNorm statistics need batches of at least two images. Pass such batches.")
    return found
