"""Values -> the range that a grid should span.

`minmax` clips nothing. `percentile` clips a share of the values on each side. `mse` takes, among ranges shrunk from
minmax, the one with the smallest mean squared rounding error (as in "Post training 4-bit quantization", Banner et
al. 2019, and the MSE search of every later toolkit). Activations are judged on a histogram, weights directly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.core.affine import Grid, affine_parameters, symmetric_scale, to_integers

SHRINK = torch.linspace(1.0, 0.3, 71)
"""Fractions of the full range that the MSE search tries."""


class Histogram:
    """Counts of values between their smallest and largest, filled in two passes: `widen` all, then `count` all."""

    def __init__(self, bins: int = 2048) -> None:
        self.low = torch.tensor(0.0)
        self.high = torch.tensor(0.0)
        self.counts = torch.zeros(bins, dtype=torch.float64)

    def widen(self, values: Tensor) -> None:
        """Makes room for `values` (any shape); zero is always inside."""
        low, high = torch.aminmax(values.detach().float())
        self.low, self.high = torch.minimum(self.low, low.cpu()), torch.maximum(self.high, high.cpu())

    def count(self, values: Tensor) -> None:
        """Counts `values`, which `widen` has seen before."""
        flat = values.detach().float().flatten().cpu()
        span = (self.high - self.low).clamp(min=torch.finfo(torch.float32).tiny)
        bins = self.counts.numel()
        places = ((flat - self.low) * (bins / span)).clamp_(0, bins - 1).to(torch.int64)
        self.counts += torch.bincount(places, minlength=bins)

    @property
    def centres(self) -> Tensor:
        """The middle of every bin (bins,)."""
        bins = self.counts.numel()
        return self.low + (torch.arange(bins) + 0.5) * ((self.high - self.low) / bins)

    def percentile(self, percent: float) -> tuple[Tensor, Tensor]:
        """The range that keeps the middle `percent` of the values."""
        cumulative = self.counts.cumsum(0) / self.counts.sum().clamp(min=1)
        tail = (100 - percent) / 200
        edges = torch.tensor([tail, 1 - tail], dtype=cumulative.dtype)
        low, high = torch.searchsorted(cumulative, edges).clamp(max=self.counts.numel() - 1)
        return self.centres[low].clamp(max=0), self.centres[high].clamp(min=0)

    def least_squares(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """The shrunk range whose rounding error, weighted by the counts, is smallest."""
        best, chosen = torch.tensor(torch.inf, dtype=torch.float64), (self.low, self.high)
        for shrink in SHRINK:
            scale, zero_point = affine_parameters(self.low * shrink, self.high * shrink, grid)
            shown = (to_integers(self.centres, scale, zero_point, grid) - zero_point) * scale
            error = (self.counts * (shown - self.centres).square()).sum()
            if error < best:
                best, chosen = error, (self.low * shrink, self.high * shrink)
        return chosen


def channel_maxima(weight: Tensor) -> Tensor:
    """The largest absolute value of each output channel: (C, ...) -> (C,)."""
    return weight.detach().float().abs().flatten(1).amax(1)


def least_squares_scale(weight: Tensor, grid: Grid) -> Tensor:
    """For each output channel the symmetric scale with the smallest squared rounding error: (C, ...) -> (C,)."""
    flat = weight.detach().float().flatten(1)
    largest = flat.abs().amax(1)
    best = torch.full_like(largest, torch.inf)
    chosen = symmetric_scale(largest, grid)
    zero = torch.zeros((), dtype=torch.int32, device=flat.device)
    for shrink in SHRINK:
        scale = symmetric_scale(largest * shrink, grid)
        shown = to_integers(flat, scale[:, None], zero, grid) * scale[:, None]
        error = (shown - flat).square().sum(1)
        chosen = torch.where(error < best, scale, chosen)
        best = torch.minimum(error, best)
    return chosen


def without_saturation(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Widens `scale` (C,) until no two integers of a channel of `weight` (C, ...) exceed 128 together.

    AVX2 multiplies unsigned by signed bytes and adds two products in 16 bits: 255 * 128 still fits into 32767. The
    usual remedy, half the range for all weights, costs every channel a bit; this one only those that need it.
    """
    if grid.maximum <= 64:
        return scale
    largest = weight.detach().float().abs().flatten(1)
    pair = largest.topk(min(2, largest.shape[1]), dim=1).values.sum(1)
    return torch.maximum(scale, pair / 127)
