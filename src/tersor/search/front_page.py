"""`front.json` -> `report.html`: the Pareto front in charts and a table.

The page loads nothing. It is complete without its script, which adds a chart to explore and a comparison of two points.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tersor.core.files import write_file
from tersor.evaluation.multiply_peak import INTEGERS, share_of_peak
from tersor.evaluation.results import Peak
from tersor.report.page import REPORT, script_values, style_values
from tersor.report.templating import environment
from tersor.report.verdict import RUNTIMES
from tersor.search.folder import Front
from tersor.search.front import Point
from tersor.search.point_evidence import read_evidence
from tersor.search.verdict_line import test_use, verdict_lines

_MARGIN, _VERTICAL_MARGIN = 1.08, 0.08
"""Factor between the outermost point of a logarithmic axis and its end; margin of the vertical axis, as a share."""
_SHOWN_DROP = 12.0
"""A chart shows this many points below the best; lower networks are drawn at its lower edge."""


@dataclass(frozen=True)
class Chart:
    """A chart: positions from 0 to 1 on a logarithmic horizontal axis and a linear vertical one."""

    title: str
    points: list[dict[str, Any]]
    limit: float | None
    floor: float | None
    low: float
    high: float
    bottom: float
    top: float


@dataclass(frozen=True)
class _Panel:
    """The horizontal axis of a chart: its title, and of a point the value, its text, and the limit of the value."""

    title: str
    value: Callable[[Point], float]
    text: Callable[[Point], str]
    limit: float | None = None


def write_front_page(folder: Path, front: Front) -> Path:
    """Write `report.html`; returns its path."""
    points = [*front.baselines, *front.points, *front.dominated]
    rows = sorted({point.name: point for point in points}.values(), key=lambda point: (not point.free, point.mean_ms))
    kept = {point.name for point in front.points}
    evidence = read_evidence(folder)
    peaks = [Peak.model_validate(each) for each in evidence.pop("peaks", [])]
    peak_percent = partial(_peak_percent, peaks)
    page = environment().get_template("front.html").render(
        **style_values(),
        **script_values("front.js"),
        front=front,
        lines=verdict_lines(front),
        test_use=test_use(front),
        dropped={**{name: f"Failed: {reason}" for name, reason in front.failed.items()}, **front.dropped},
        rows=rows,
        kept=kept,
        charts_of_front=charts(front, rows),
        families=Counter(_family(point) for point in rows),
        peaks=peaks,
        peak_percent=peak_percent,
        data=_explorer_data(front, evidence, rows, peak_percent),
    )  # fmt: skip
    write_file(folder / REPORT, page.encode("utf-8", "replace"))
    return folder / REPORT


def _explorer_data(
    front: Front, evidence: dict[str, Any], rows: list[Point], peak_percent: Callable[[Point, int], float | None]
) -> dict[str, Any]:
    """What the script shows, in plain values."""
    kept = {point.name for point in front.points}
    return {
        "metric": front.metric,
        "original": front.original,
        "best": front.best,
        "limits": front.limits,
        "chart": {"margin": _MARGIN, "vertical_margin": _VERTICAL_MARGIN, "shown_drop": _SHOWN_DROP},
        "sizes": list(front.points[0].latency_ms),
        "evidence": evidence,
        "points": [
            {
                "name": point.name,
                "description": point.description,
                "family": _family(point),
                "kind": _kind(point, kept),
                "runtime": RUNTIMES[point.runtime],
                "precision": point.precision,
                "validation": round(point.validation, 4),
                "test": point.test,
                "latency": point.latency_ms,
                "milliseconds": {size: point.milliseconds(size) for size in point.latency_ms},
                "megabytes": point.bytes / 1e6,
                "macs": point.macs / 1e6,
                "steps": point.steps,
                "seconds": point.seconds,
                "peak": {size: peak_percent(point, size) for size in point.latency_ms},
            }
            for point in rows
        ],
    }


def _family(point: Point) -> str:
    return "free baselines" if point.free else point.family


def _kind(point: Point, kept: Collection[str]) -> str:
    return "baseline" if point.free else "artifact" if point.name in kept else "original"


def _peak_percent(peaks: Sequence[Peak], point: Point, size: int) -> float | None:
    """Percent of the peak throughput. 8-bit files count as having all of their MACs in integers."""
    integers = float(point.precision == INTEGERS)
    share = share_of_peak(point.runtime, point.precision, size * point.macs, point.latency_ms[size], peaks, integers)
    return None if share is None else 100 * share


def charts(front: Front, points: list[Point]) -> list[Chart]:
    """The metric against the latency at each batch size, the size of the file and the MACs."""
    sizes = list(front.points[0].latency_ms)
    limits: dict[str, Any] = front.limits
    panels = [
        _Panel(
            f"ms at batch {size}",
            lambda point, size=size: point.latency_ms[size],
            lambda point, size=size: point.milliseconds(size),
            limits["latency_ms"].get(str(size)),
        )
        for size in sizes
    ]
    panels.append(
        _Panel("MB", lambda each: each.bytes / 1e6, lambda each: f"{each.bytes / 1e6:.3g}", limits["megabytes"])
    )
    panels.append(_Panel("million MACs", lambda each: each.macs / 1e6, lambda each: f"{each.macs / 1e6:.3g}"))
    return [_chart(front, points, panel) for panel in panels]


def _chart(front: Front, points: list[Point], panel: _Panel) -> Chart:
    title, value, limit = panel.title, panel.value, panel.limit
    values = [*map(value, points), *([] if limit is None else [limit])]
    low, high = min(values) / _MARGIN, max(values) * _MARGIN
    best = max(point.validation for point in points)
    worst = max(best - _SHOWN_DROP, min(point.validation for point in points))
    margin = _VERTICAL_MARGIN * max(best - worst, 0.1)
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
            "kind": _kind(point, kept),
            "label": f"{point.name} ({point.description}): {point.validation:.2f} %, {panel.text(point)} {title}",
        }
        for point in points
    ]
    return Chart(title, dots, None if limit is None else place(limit), floor, low, high, bottom, top)
