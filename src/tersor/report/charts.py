"""Coordinates of the charts, which `templates/charts.html` renders as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_KERNEL_GAP = 0.7
"""Space between two kernels of a mask, in weights."""

Groups = Sequence[tuple[str, float | Mapping[str, float] | None]]


def share(value: float, largest: float) -> str:
    """`value` in percent of `largest`, as an SVG length."""
    return f"{100 * value / largest if largest else 0:.2f}%"


def grouped(groups: Groups, kind: str) -> list[tuple[str, Mapping[str, float]]]:
    """Groups with their values by kind. A plain number gets the kind `kind`; None becomes an empty group."""
    return [
        (name, values if isinstance(values, Mapping) else {} if values is None else {kind: values})
        for name, values in groups
    ]


def largest_value(groups: Sequence[tuple[str, Mapping[str, float]]]) -> float:
    """The largest value of all groups; 1 if there is none above 0."""
    return max((value for _, values in groups for value in values.values()), default=0.0) or 1.0


def histogram_span(histogram: Mapping[str, Any]) -> float:
    """The length of the axis."""
    return max(len(histogram["before"]) * histogram["width"], len(histogram["after"]) * histogram["after_width"])


def histogram_paths(histogram: Mapping[str, Any], *, cut_zero: bool = True) -> tuple[str, str]:
    """Two histograms over one axis, by density: an area and bars, as SVG paths in a box of 256 x 64.

    Args:
        histogram: counts `before` (the area, may be empty) and `after` (the bars) in bins of `width` and `after_width`
            from `low`.
        cut_zero: do not scale to the bar at zero, which is often far higher than all others.
    """
    low, width, after_width = histogram["low"], histogram["width"], histogram["after_width"]
    span = histogram_span(histogram)
    before = [count / width for count in histogram["before"]]
    after = [count / after_width for count in histogram["after"]]
    zero = int(-low // after_width)
    others = [*after[:zero], *after[zero + 1 :]] if cut_zero else after
    highest = max([*others, *before, 0.0]) or max(after)
    slim = 0.5 if after_width > 2 * width else 1.0
    area = "".join(
        f"V{_short(64 - 64 * min(1.0, value / highest))}H{_short((index + 1) * width / span * 256)}"
        for index, value in enumerate(before)
    )
    bars = "".join(
        f"M{_short((index + 0.5 - slim / 2) * after_width / span * 256)} 64"
        f"v{_short(-64 * min(1.0, value / highest))}h{_short(slim * after_width / span * 256)}V64z"
        for index, value in enumerate(after)
        if value
    )
    return f"M0 64{area}V64z" if before else "", bars


def line_points(points: Sequence[tuple[float, float]], end: float, low: float, high: float) -> list[str]:
    """(x, y) in a box of 256 x 64, with x from 0 to `end` and y from `low` to `high`."""
    span = high - low or 1.0
    return [f"{_short(256 * x / end)} {_short(62 - 60 * (y - low) / span)}" for x, y in points]


def opacities(rows: Sequence[Sequence[float]]) -> list[list[str]]:
    """Values (H, W) of a heat map as opacities, from the smallest value to the largest."""
    values = [value for row in rows for value in row]
    least, span = min(values), max(values) - min(values) or 1.0
    return [[f"{0.04 + 0.96 * (value - least) / span:.2f}" for value in row] for row in rows]


def mask_paths(filters: Sequence[Sequence[str]], shape: Sequence[int]) -> tuple[str, str, str]:
    """Masks as a view box and two SVG paths: all kernels, and the weights that are not masked.

    Args:
        filters: for each filter (a row) the kernels of its input channels, as strings of 1 (not masked) and 0.
        shape: shape of the weight, (C_out, C_in, ...).
    """
    wide = shape[-1] if len(shape) > 2 else 1
    high = len(filters[0][0]) // wide
    kernels: list[str] = []
    unmasked: list[str] = []
    for row, channels in enumerate(filters):
        for column, kernel in enumerate(channels):
            left, top = column * (wide + _KERNEL_GAP), row * (high + _KERNEL_GAP)
            kernels.append(f"M{_short(left)} {_short(top)}h{wide}v{high}h-{wide}z")
            unmasked += [
                f"M{_short(left + index % wide)} {_short(top + index // wide)}h1v1h-1z"
                for index, bit in enumerate(kernel)
                if bit == "1"
            ]
    width, height = (count * (side + _KERNEL_GAP) - _KERNEL_GAP for count, side in
                     ((len(filters[0]), wide), (len(filters), high)))  # fmt: skip
    return f"0 0 {_short(width)} {_short(height)}", "".join(kernels), "".join(unmasked)


def _short(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
