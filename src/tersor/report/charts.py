"""Drawings as inline SVG: in percent where text stands beside, so that they fit any width undistorted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tersor.report.templates import Markup, number, tag

_DOTTED = 60
"""Values of a line at most, for each of them to have a dot."""
_GAP = 0.7
"""Between two kernels, in weights."""


def dots(values: Sequence[float], longest: float, kind: str, label: str) -> Markup:
    """Every run as a dot on an axis from 0 to `longest` ms, the median as a line; runs beyond are triangles at the end.

    Args:
        values: milliseconds, in the order they were taken.
        longest: end of the axis.
        kind: "original", "baseline" or "artifact", which has the colour.
        label: what is read out.
    """
    marks = [_run(place, value, longest) for place, value in enumerate(values)]
    middle = _percent(sorted(values)[len(values) // 2], longest)
    line = tag("line", x1=middle, x2=middle, y1=2, y2=38, class_="median")
    return tag("svg", *marks, line, class_=f"dots {kind}", role="img", aria_label=label, width="100%", height=40)


def _run(place: int, value: float, longest: float) -> Markup:
    told = tag("title", f"run {place + 1}: {number(value, 4)} ms")
    y = 6 + (place * 18) % 29  # spread without chance
    if value <= longest:
        return tag("circle", told, cx=_percent(value, longest), cy=y, r=2.2)
    return tag("rect", told, x="99%", y=y - 3, width="1%", height=6, class_="beyond")


def bar(value: float, largest: float, kind: str, label: str) -> Markup:
    """One horizontal bar."""
    inner = tag("rect", tag("title", label), width=_percent(value, largest), height="100%", rx=1)
    return tag("svg", inner, class_=f"bar {kind}", role="img", aria_label=label, width="100%", height=12)


def columns(
    groups: Sequence[tuple[str, Mapping[str, float]]],
    label: str,
    height: int = 110,
    *,
    largest: float | None = None,
) -> Markup:
    """Columns side by side: for each (name, kind -> value) one column of each kind, from the left to the right.

    Args:
        groups: from the left to the right.
        label: what is read out.
        height: in pixels.
        largest: the value of a full column; the largest there is if left.
    """
    largest = largest or max((value for _, values in groups for value in values.values()), default=0.0) or 1.0
    step = 100 / max(1, len(groups))
    drawn: list[Markup] = []
    for place, (name, values) in enumerate(groups):
        told = f"{name}: " + ", ".join(f"{kind} {number(value)}" for kind, value in values.items())
        each = 0.84 * step / max(1, len(values))
        bars = [
            tag("rect", x=f"{place * step + order * each:.3f}%", y=f"{100 - 100 * value / largest:.2f}%",
                width=f"{each * 0.94:.3f}%", height=f"{100 * value / largest:.2f}%", class_=kind)
            for order, (kind, value) in enumerate(values.items())
        ]  # fmt: skip
        reach = tag("rect", x=f"{place * step:.3f}%", y="0", width=f"{step:.3f}%", height="100%", class_="reach")
        drawn.append(tag("g", tag("title", told), reach, *bars))
    return tag("svg", *drawn, class_="columns", role="img", aria_label=label, width="100%", height=height)


def histogram(told: Mapping[str, Any], label: str, *, cut: bool = True) -> Markup:
    """Weights before as an area, as they are shown as bars, both by density; the bar at 0 may be `cut` off."""
    low, width, shown_width = told["low"], told["width"], told["shown_width"]
    span = max(len(told["before"]) * width, len(told["shown"]) * shown_width)
    before = [count / width for count in told["before"]]
    shown = [count / shown_width for count in told["shown"]]
    zero = int(-low // shown_width)
    others = [*shown[:zero], *shown[zero + 1 :]] if cut else shown
    highest = max([*others, *before, 0.0]) or max(shown)
    slim = 0.5 if shown_width > 2 * width else 1.0
    bars = "".join(
        f"M{_short((place + 0.5 - slim / 2) * shown_width / span * 256)} 64"
        f"v{_short(-64 * min(1.0, value / highest))}h{_short(slim * shown_width / span * 256)}V64z"
        for place, value in enumerate(shown)
        if value
    )
    steps = "".join(
        f"V{_short(64 - 64 * min(1.0, value / highest))}H{_short((place + 1) * width / span * 256)}"
        for place, value in enumerate(before)
    )
    drawn = [tag("path", d=f"M0 64{steps}V64z", class_="original")] if before else []
    drawn.append(tag("path", d=bars, class_="artifact"))
    return tag(
        "svg", tag("title", label), *drawn, class_="histogram", role="img", aria_label=label, viewBox="0 0 256 64",
        preserveAspectRatio="none", width="100%", height=64,
    )  # fmt: skip


def heat_map(rows: Sequence[Sequence[float]], label: str) -> Markup:
    """Values (H, W) as squares, from the least of them, faint, to the most."""
    flat = [value for row in rows for value in row]
    least, span = min(flat), max(flat) - min(flat) or 1.0
    squares = [
        tag("rect", x=x, y=y, width=1.02, height=1.02, fill_opacity=f"{0.04 + 0.96 * (value - least) / span:.2f}")
        for y, row in enumerate(rows)
        for x, value in enumerate(row)
    ]
    box = f"0 0 {len(rows[0])} {len(rows)}"
    return tag("svg", tag("title", label), *squares, class_="heatmap", role="img", aria_label=label, viewBox=box)


def line(
    points: Sequence[tuple[float, float]],
    end: float,
    edges: tuple[float, float],
    kind: str,
    label: str,
    height: int = 48,
) -> Markup:
    """Values over a way from 0 to `end`, between two `edges`; few of them have a dot each.

    Args:
        points: (x, y), in order.
        end: of the way.
        edges: what lies at the lower edge and what at the upper.
        kind: "sparsity", "changed" or "accuracy", which has the colour.
        label: what is read out.
        height: in pixels.
    """
    low, span = edges[0], edges[1] - edges[0] or 1.0
    places = [(_short(256 * x / end), _short(62 - 60 * (y - low) / span)) for x, y in points]
    way = "L".join(f"{x} {y}" for x, y in places)
    drawn = [tag("path", d=f"M{way}")]
    if len(places) <= _DOTTED:
        drawn.append(tag("path", d="".join(f"M{x} {y}h0" for x, y in places), class_="dot"))
    return tag(
        "svg", tag("title", label), *drawn, class_=f"line {kind}", role="img", aria_label=label, viewBox="0 0 256 64",
        preserveAspectRatio="none", width="100%", height=height,
    )  # fmt: skip


def silhouette(widths: Sequence[tuple[str, int, int]], label: str) -> Markup:
    """A network from its first layer to its last, as wide as each layer was, and is: (name, before, after)."""
    widest = max(max(before, after) for _, before, after in widths)
    step = 256 / len(widths)
    drawn: list[Markup] = []
    for place, (name, before, after) in enumerate(widths):
        told = f"{name}: {before:,} channels" + (f", {after:,} left" if after != before else "")
        bars = [
            tag("rect", x=_short(place * step + 0.06 * step), y=f"{32 - 32 * width / widest:.2f}",
                width=f"{0.88 * step:.2f}", height=f"{64 * width / widest:.2f}", class_=kind)
            for kind, width in (("original", before), ("artifact", after))
        ]  # fmt: skip
        drawn.append(tag("g", tag("title", told), *bars))
    return tag(
        "svg", *drawn, class_="silhouette", role="img", aria_label=label, viewBox="0 0 256 64",
        preserveAspectRatio="none", width="100%", height=120,
    )  # fmt: skip


def mask_grid(filters: Sequence[Sequence[str]], kernel: tuple[int, int], label: str) -> Markup:
    """Masks of filters, one below the other, their kernels side by side: a square for each weight, filled if kept.

    Args:
        filters: of each filter the kernels of its input channels, as text of 1 (kept) and 0, row by row.
        kernel: height and width.
        label: what is read out.
    """
    high, wide = kernel
    kernels: list[str] = []
    kept: list[str] = []
    for row, channels in enumerate(filters):
        for column, shown in enumerate(channels):
            left, top = column * (wide + _GAP), row * (high + _GAP)
            kernels.append(f"M{_short(left)} {_short(top)}h{wide}v{high}h-{wide}z")
            kept += [
                f"M{_short(left + at % wide)} {_short(top + at // wide)}h1v1h-1z"
                for at, one in enumerate(shown)
                if one == "1"
            ]
    size = (len(filters[0]) * (wide + _GAP) - _GAP, len(filters) * (high + _GAP) - _GAP)
    return tag(
        "svg", tag("title", label), tag("path", d="".join(kernels), class_="masked"),
        tag("path", d="".join(kept), class_="kept"), class_="masks", role="img", aria_label=label,
        viewBox=f"0 0 {_short(size[0])} {_short(size[1])}", preserveAspectRatio="xMinYMid",
        shape_rendering="crispEdges",
    )  # fmt: skip


def _percent(value: float, largest: float) -> str:
    return f"{100 * value / largest if largest else 0:.2f}%"


def _short(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
