"""`front.json` -> `report.html`: the Pareto front in charts and a table. The page loads nothing and runs no script."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.core.files import write_file
from tersor.report.page import REPORT, style_values
from tersor.report.templating import environment
from tersor.search.folder import Front
from tersor.search.front import Point
from tersor.search.verdict_line import verdict_lines

_MARGIN = 1.08
"""Factor between the outermost point of a logarithmic axis and its end."""
_SHOWN_DROP = 12.0
"""A chart shows this many points below the best; lower networks are drawn at its lower edge."""


@dataclass(frozen=True)
class Chart:
    """A chart: places from 0 to 1 on a logarithmic horizontal axis and a linear vertical one."""

    title: str
    points: list[dict[str, Any]]
    limit: float | None
    floor: float | None
    low: float
    high: float
    bottom: float
    top: float


def write_front_page(folder: Path, front: Front) -> Path:
    """Write `report.html`; returns it."""
    points = [*front.baselines, *front.points, *front.dominated]
    rows = list({point.name: point for point in points}.values())
    kept = {point.name for point in front.points}
    page = environment().get_template("front.html").render(
        **style_values(),
        front=front,
        lines=verdict_lines(front),
        rows=sorted(rows, key=lambda point: (not point.free, point.mean_ms)),
        kept=kept,
        charts_of_front=charts(front, rows),
    )  # fmt: skip
    write_file(folder / REPORT, page.encode("utf-8", "replace"))
    return folder / REPORT


def charts(front: Front, points: list[Point]) -> list[Chart]:
    """The metric against the latency at each batch size, the size of the file and the MACs."""
    sizes = list(front.points[0].latency_ms)
    limits: dict[str, Any] = front.limits
    panels: list[tuple[str, Callable[[Point], float], float | None]] = [
        (f"ms at batch {size}", lambda point, size=size: point.latency_ms[size], limits["latency_ms"].get(str(size)))
        for size in sizes
    ]
    panels.append(("MB", lambda point: point.bytes / 1e6, limits["megabytes"]))
    panels.append(("million MACs", lambda point: point.macs / 1e6, None))
    return [_chart(front, points, title, value, limit) for title, value, limit in panels]


def _chart(
    front: Front, points: list[Point], title: str, value: Callable[[Point], float], limit: float | None
) -> Chart:
    values = [*map(value, points), *([] if limit is None else [limit])]
    low, high = min(values) / _MARGIN, max(values) * _MARGIN
    best = max(point.validation for point in points)
    worst = max(best - _SHOWN_DROP, min(point.validation for point in points))
    margin = 0.08 * max(best - worst, 0.1)
    bottom, top = worst - margin, best + margin
    kept = {point.name for point in front.points}

    def place(amount: float) -> float:
        return math.log(amount / low) / math.log(high / low)

    def height(metric: float) -> float:
        return max(0.0, (metric - bottom) / (top - bottom))

    drop = front.limits["max_drop"]
    floor = None if drop is None else height(front.point(front.original).validation - drop)
    dots = [
        {
            "x": place(value(point)),
            "y": height(point.validation),
            "kind": "baseline" if point.free else "artifact" if point.name in kept else "original",
            "label": f"{point.description}: {point.validation:.2f} %, {value(point):.3g} {title}",
        }
        for point in points
    ]
    return Chart(title, dots, None if limit is None else place(limit), floor, low, high, bottom, top)
