"""Positions of weights between the points of a grid, before and after training, and how far the weights moved.

w         (C, ...)   a weight
scale                step of its grid, broadcasts against w
position  = w / scale - q, with q the nearest integer of the grid: 0 on a point, -0.5 and 0.5 halfway to the next
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tersor.quantization.grid import Grid, symmetric_scale

_POSITIONS = 33
"""Bins from -0.5 to 0.5; an odd number, so that one bin is centered on the points."""
_DISTANCES = 10
"""Bins from 0 to 0.5."""
_LAYERS = 6
"""Number of layers reported one by one, evenly from the first to the last."""


class WeightOnGrid(NamedTuple):
    """A weight, and the grid that it would be rounded to."""

    weight: Tensor
    scale: Tensor
    grid: Grid

    @property
    def integers(self) -> Tensor:
        """The nearest integers of the grid, in the shape and data type of the weight."""
        return (self.weight / self.scale).round_().clamp_(self.grid.minimum, self.grid.maximum)

    @property
    def distances(self) -> Tensor:
        """Distances to the nearest points, in the unit of the weight."""
        return torch.addcmul(self.weight, self.integers, self.scale, value=-1).abs_()

    @property
    def positions(self) -> Tensor:
        """Positions of all weights, in steps, (weights,); beyond -0.5 and 0.5 for weights outside the grid."""
        return (self.weight / self.scale - self.integers).flatten()


def on_grid(weight: Tensor, largest: Tensor, grid: Grid) -> WeightOnGrid:
    """`weight` on a symmetric grid whose last point is `largest`, () or (C,)."""
    return WeightOnGrid(weight, symmetric_scale(largest, grid).view(-1, *[1] * (weight.ndim - 1)), grid)


def around_zero(weight: Tensor) -> WeightOnGrid:
    """`weight` on a grid whose only point is zero, with a step of twice the largest weight."""
    return WeightOnGrid(weight, symmetric_scale(2 * weight.abs().max(), Grid(-1, 1)), Grid(0, 0))


@torch.no_grad()
def drawn(before: Mapping[str, WeightOnGrid], after: Mapping[str, WeightOnGrid]) -> dict[str, Any]:
    """Summarize the effect of training on positions: for `all` weights, and for some `layers` (`name`, `bits`).

    Each summary has `before` and `after` (histograms of positions from -0.5 to 0.5), `distance` (mean |position| before
    and after), and `moved` (mean |w' - w|, in bins of |position| before from 0 to 0.5; None for an empty bin). The unit
    is a step of the grid; for `moved`, a step of the grid at the start.

    Args:
        before: layer -> its weight at the start.
        after: the same layers, at the end.
    """
    tallies = {name: _tally(before[name], after[name]) for name in before}
    together = [torch.stack(each).sum(0) for each in zip(*tallies.values(), strict=True)]
    names = list(before)
    places = torch.linspace(0, len(names) - 1, min(_LAYERS, len(names))).round().long().tolist()
    few = [names[place] for place in places]
    layers = [{"name": name, "bits": before[name].grid.bits, **_plain(tallies[name])} for name in few]
    return {"all": _plain(together), "layers": layers}


def _tally(before: WeightOnGrid, after: WeightOnGrid) -> list[Tensor]:
    """Sums, which can be added over layers."""
    start, end = before.positions.double(), after.positions.double()
    path = ((after.weight - before.weight) / before.scale).abs().flatten().double()
    places = (start.abs() * 2 * _DISTANCES).long().clamp(max=_DISTANCES - 1)
    return [
        _counts(start),
        _counts(end),
        torch.stack([start.abs().sum(), end.abs().sum()]),
        torch.bincount(places, path, minlength=_DISTANCES),
        torch.bincount(places, minlength=_DISTANCES),
    ]


def _counts(positions: Tensor) -> Tensor:
    places = ((positions + 0.5) * _POSITIONS).floor().long().clamp(0, _POSITIONS - 1)
    return torch.bincount(places, minlength=_POSITIONS)


def _plain(tally: list[Tensor]) -> dict[str, Any]:
    start, end, far, path, count = tally
    moved = [total / weights if weights else None for total, weights in zip(path.tolist(), count.tolist(), strict=True)]
    distance = (far / start.sum()).tolist()
    return {"before": start.tolist(), "after": end.tolist(), "distance": distance, "moved": moved}
