"""Where weights lie between the points of a grid, before a training and after it, and how far each has moved.

w         (C, ...)   a weight
scale                the step of its grid, broadcasts against w
position  = w / scale - q, with q the nearest integer of the grid: 0 on a point, -0.5 and 0.5 halfway to the next
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tersor.quantization.grid import Grid, symmetric_scale

_POSITIONS = 33
"""Bins from -0.5 to 0.5: an odd number, so that weights on a point have one of their own."""
_DISTANCES = 10
"""Bins from 0 to 0.5."""
_LAYERS = 6
"""Told one by one, from the first to the last."""


class Laid(NamedTuple):
    """A weight and the grid that it would be rounded to."""

    weight: Tensor
    scale: Tensor
    grid: Grid

    @property
    def integers(self) -> Tensor:
        """Of the nearest points, as the weight, in its data type."""
        return (self.weight / self.scale).round_().clamp_(self.grid.minimum, self.grid.maximum)

    @property
    def distances(self) -> Tensor:
        """From the nearest points, as large as weights are."""
        return torch.addcmul(self.weight, self.integers, self.scale, value=-1).abs_()

    @property
    def positions(self) -> Tensor:
        """Of all weights, in steps, (weights,); beyond -0.5 and 0.5 where a weight lies outside of the grid."""
        return (self.weight / self.scale - self.integers).flatten()


def on_grid(weight: Tensor, largest: Tensor, grid: Grid) -> Laid:
    """A symmetric grid whose last point is `largest`, () or (C,)."""
    return Laid(weight, symmetric_scale(largest, grid).view(-1, *[1] * (weight.ndim - 1)), grid)


def around_zero(weight: Tensor) -> Laid:
    """Zero is the only point, and the largest weight lies halfway to a next one."""
    return Laid(weight, symmetric_scale(2 * weight.abs().max(), Grid(-1, 1)), Grid(0, 0))


@torch.no_grad()
def drawn(before: Mapping[str, Laid], after: Mapping[str, Laid]) -> dict[str, Any]:
    """What a training has done, in plain values: of `all` weights, and of a few `layers` with their `name` and `bits`.

    Each has `before` and `after` (how many weights lie at each position, in bins from -0.5 to 0.5), `distance` (the
    mean |position| before and after) and `moved` (the mean |w' - w|, in bins over the |position| before from 0 to 0.5;
    None where no weight lay). All in steps, those moved in steps of the grid before.

    Args:
        before: layer -> its weight at the beginning.
        after: the same layers, at the end.
    """
    tallies = {name: _tally(before[name], after[name]) for name in before}
    together = [torch.stack(each).sum(0) for each in zip(*tallies.values(), strict=True)]
    names = list(before)
    places = torch.linspace(0, len(names) - 1, min(_LAYERS, len(names))).round().long().tolist()
    few = [names[place] for place in places]
    layers = [{"name": name, "bits": before[name].grid.bits, **_plain(tallies[name])} for name in few]
    return {"all": _plain(together), "layers": layers}


def _tally(before: Laid, after: Laid) -> list[Tensor]:
    """Sums, so that those of several layers add up."""
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
    start, end, far, path, lay = tally
    moved = [total / count if count else None for total, count in zip(path.tolist(), lay.tolist(), strict=True)]
    distance = (far / start.sum()).tolist()
    return {"before": start.tolist(), "after": end.tolist(), "distance": distance, "moved": moved}
