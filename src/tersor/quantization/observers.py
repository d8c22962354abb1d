"""Observers: values -> the range that a grid should span.

`minmax` clips nothing. `percentile` clips a share of the values on each side. `mse` takes the range, among those shrunk
from minmax, with the smallest mean squared rounding error (as in "Post training 4-bit quantization", Banner et al.
2019, and the MSE search of every later toolkit). `entropy` takes the one whose rounded values have the distribution
most similar to that of the values (Migacz, "8-bit inference with TensorRT", GTC 2017: the smallest Kullback-Leibler
divergence). The errors of activations are computed from a histogram, those of weights from all values.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tersor.quantization.grid import Grid, affine_parameters, symmetric_scale, to_integers

SHRINK = torch.linspace(1.0, 0.1, 91)
"""Fractions of the full range that the search tries."""

_SMALL = torch.logspace(-1.02, -3, 40)
"""Smaller ones, for a weight far above the others whose input is almost always zero."""

_TOGETHER = 2**18
"""Rounded values that the search holds at once."""

WeightRange = Literal["minmax", "percentile", "mse"]
Range = Literal["minmax", "percentile", "mse", "entropy"]


class Histogram:
    """A histogram filled in two passes: `widen` for the range, then `count`."""

    def __init__(self, bins: int = 2048) -> None:
        self.low = torch.tensor(0.0)
        self.high = torch.tensor(0.0)
        self.counts = torch.zeros(bins, dtype=torch.float64)

    def widen(self, values: Tensor) -> None:
        """Extend the range to `values`, of any shape; zero is always inside."""
        low, high = torch.aminmax(values.detach().float())
        self.low, self.high = torch.minimum(self.low, low.cpu()), torch.maximum(self.high, high.cpu())

    def count(self, values: Tensor) -> None:
        """Count `values`, to which `widen` has extended the range."""
        flat = values.detach().float().flatten().cpu()
        span = (self.high - self.low).clamp(min=torch.finfo(torch.float32).tiny)
        bins = self.counts.numel()
        places = ((flat - self.low) / span * bins).clamp_(0, bins - 1).to(torch.int64)  # bins / span may be infinite
        self.counts += torch.bincount(places, minlength=bins)

    @property
    def centres(self) -> Tensor:
        """The center of every bin (bins,)."""
        bins = self.counts.numel()
        return self.low + (torch.arange(bins) + 0.5) * ((self.high - self.low) / bins)

    def percentile(self, percent: float) -> tuple[Tensor, Tensor]:
        """The range of the middle `percent` of the values."""
        cumulative = self.counts.cumsum(0) / self.counts.sum().clamp(min=1)
        tail = (100 - percent) / 200
        edges = torch.tensor([tail, 1 - tail], dtype=cumulative.dtype)
        low, high = torch.searchsorted(cumulative, edges).clamp(max=self.counts.numel() - 1)
        return self.centres[low].clamp(max=0), self.centres[high].clamp(min=0)

    def least_squares(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """The shrunk range whose rounding error, weighted by the counts, is smallest."""
        lows, highs, centres = self.low * SHRINK, self.high * SHRINK, self.centres
        scales, zero_points = (each[:, None] for each in affine_parameters(lows, highs, grid))
        rounded = (to_integers(centres, scales, zero_points, grid) - zero_points) * scales
        best = (self.counts * (rounded - centres).square()).sum(1).argmin()
        return lows[best], highs[best]

    def least_divergence(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """The shrunk range whose rounded values have the distribution most similar to that of the clipped values.

        It minimizes the divergence of the clipped values from the rounded ones, whose levels are spread evenly over
        their non-empty bins.
        """
        best, chosen = torch.tensor(torch.inf, dtype=torch.float64), (self.low, self.high)
        for shrink in SHRINK:
            low, high = self.low * shrink, self.high * shrink
            scale, zero_point = affine_parameters(low, high, grid)
            levels = (to_integers(self.centres, scale, zero_point, grid) - grid.minimum).to(torch.int64)
            inside = (self.centres >= low) & (self.centres <= high)
            clipped = torch.where(inside, self.counts, torch.zeros_like(self.counts))
            first, last = inside.nonzero()[0], inside.nonzero()[-1]
            clipped[first] += self.counts[self.centres < low].sum()
            clipped[last] += self.counts[self.centres > high].sum()
            held = (inside & (self.counts > 0)).double()
            size = grid.maximum - grid.minimum + 1
            shares = torch.bincount(levels, self.counts * inside, size) / torch.bincount(levels, held, size).clamp(
                min=1
            )
            spread = shares[levels] * held
            error = _divergence(clipped, spread)
            if error < best:
                best, chosen = error, (low, high)
        return chosen

    def range(self, kind: Range, grid: Grid, percentile: float) -> tuple[Tensor, Tensor]:
        """The range of a `kind`; `percentile` is used by the kind of that name."""
        match kind:
            case "minmax":
                return self.low, self.high
            case "percentile":
                return self.percentile(percentile)
            case "mse":
                return self.least_squares(grid)
            case "entropy":
                return self.least_divergence(grid)


def _divergence(clipped: Tensor, rounded: Tensor) -> Tensor:
    """Kullback-Leibler divergence of two histograms (bins,), which need not sum to 1."""
    p, q = clipped / clipped.sum().clamp(min=1), rounded / rounded.sum().clamp(min=1)
    some = p > 0
    return (p[some] * (p[some] / q[some].clamp(min=1e-9)).log()).sum()


def channel_maxima(weight: Tensor) -> Tensor:
    """The largest absolute value of each output channel: (C, ...) -> (C,)."""
    return weight.detach().float().abs().flatten(1).amax(1)


def weight_grid(
    weight: Tensor,
    grid: Grid,
    *,
    per_channel: bool = True,
    weight_range: WeightRange = "minmax",
    percentile: float = 99.99,
    share: Tensor | None = None,
    energies: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a weight (C, ...): (C,) each, or () with one grid for all channels.

    Args:
        weight: input of the quantizer.
        grid: its integers; if they are not symmetric, there is a zero point.
        per_channel: whether each output channel has its own scale.
        weight_range: how the range is chosen.
        percentile: percent of the values inside the range, for `weight_range: percentile`.
        share: share of that range that the grid spans, (C,) or (); default: all of it.
        energies: mean square of the input that each weight multiplies, of the shape of `weight`. For `weight_range:
            mse`, the squared rounding errors are multiplied by it, and much smaller ranges are tried too.
    """
    rows = (len(weight), -1) if per_channel else (1, -1)
    flat = weight.detach().float().reshape(rows)
    if weight_range == "percentile":
        ordered = flat.sort(1).values
        last = ordered.shape[1] - 1
        tail = round((100 - percentile) / 200 * last)
        low, high = ordered[:, tail], ordered[:, last - tail]
    else:
        low, high = flat.aminmax(dim=1)
    if share is not None:
        low, high = low * share, high * share
    scale, zero_point = _spanning(low, high, grid)
    if weight_range == "mse":
        importance = None if energies is None else energies.reshape(rows)
        scale, zero_point = _least_squares(flat, low, high, grid, importance)
    return (scale, zero_point) if per_channel else (scale[0], zero_point[0])


def _spanning(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    if not grid.symmetric:
        return affine_parameters(low, high, grid)
    scale = symmetric_scale(torch.maximum(low.abs(), high.abs()), grid)
    return scale, torch.zeros_like(scale, dtype=torch.int32)


def _least_squares(
    flat: Tensor, low: Tensor, high: Tensor, grid: Grid, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """For each row of (R, n), the grid of the shrunk range with the smallest squared error, weighted if asked."""
    least = torch.full_like(low, torch.inf)
    scale, zero_point = _spanning(low, high, grid)
    smallest = _spanning(low * SHRINK[-1], high * SHRINK[-1], grid)[0]
    together = max(1, _TOGETHER // max(1, flat.numel()))
    smaller = () if importance is None else _SMALL.to(low.device).split(together)
    for shrinks in (*SHRINK.to(low.device).split(together), *smaller):
        if shrinks[0] < SHRINK[-1] and not (scale <= smallest).any():
            break  # no row was best with the smallest range so far
        tried, zeros = _spanning(low * shrinks[:, None], high * shrinks[:, None], grid)
        rounded = (to_integers(flat, tried[..., None], zeros[..., None], grid) - zeros[..., None]) * tried[..., None]
        squares = (rounded - flat).square()
        error, best = (squares if importance is None else squares * importance).sum(2).min(0)
        better = error < least
        scale = torch.where(better, tried.gather(0, best[None])[0], scale)
        zero_point = torch.where(better, zeros.gather(0, best[None])[0], zero_point)
        least = torch.minimum(error, least)
    return scale, zero_point


def without_saturation(weight: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Widen `scale`, (C,) or (), until no two integers of a channel of `weight` (C, ...) sum to more than 128.

    The integers are those that a runtime multiplies, minus the zero point if the grid has one.

    AVX2 multiplies unsigned by signed bytes and adds two products in 16 bits, where 255 * 128 still fits. The usual
    remedy, half the range for all weights, costs every channel one bit; this costs only the channels that need it.
    """
    reach = grid.maximum if grid.symmetric else grid.maximum - grid.minimum
    if reach <= 64:
        return scale
    largest = weight.detach().float().abs().flatten(1)
    pair = largest.topk(min(2, largest.shape[1]), dim=1).values.sum(1)
    return torch.maximum(scale, (pair if scale.ndim else pair.max()) / 127)
