"""Measured points, their Pareto front, and the best point for a budget. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from tersor.evaluation.results import Speedup
from tersor.search.compression_budget import Budget

CEILING = 100.0
"""The best possible metric, in percent."""
SAME_SIZE = 0.01
"""Files whose sizes differ by less than this fraction are equally large."""


class BaselineSpeedup(Speedup):
    """The latency of the fastest free baseline, divided by that of the point."""

    baseline: str
    """Name of the baseline."""


class Point(BaseModel):
    """One measured file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)
    name: str
    """Short name; also that of the folder in `points/`, unless this is a free baseline."""
    description: str
    """What was changed, in words."""
    file: str
    """Path of the ONNX file in the folder of the search."""
    runtime: str
    """Runtime of the measurements."""
    precision: str
    """Data type of the layers: `int8`, or that of the runtime for a float file."""
    family: str = "fewer bits"
    """Kind of change, such as `fewer branches` or `student networks`."""
    free: bool = False
    """Whether it is a free baseline, which needs no search: the original, or the 8-bit original."""
    validation: Annotated[float, Field(ge=0, le=100)]
    """The metric on the validation images, in percent."""
    drop_error: Annotated[float, Field(ge=0)] = 0.0
    """One standard error of the difference from the original on the validation images, in points; for metrics other
    than the accuracy, that of the metric itself."""
    test: Annotated[float | None, Field(ge=0, le=100)] = None
    """The metric on the test images, in percent; measured at the end, for the front and the free baselines of the
    target runtime."""
    test_drop_error: Annotated[float, Field(ge=0)] = 0.0
    """One standard error of the difference from the original on the test images, in points; for metrics other
    than the accuracy, that of the metric itself."""
    latency_ms: dict[int, float]
    """Median latency by batch size, in milliseconds."""
    latency_error: dict[int, Annotated[float, Field(ge=0)]] = {}
    """Half the width of the 95 % interval of each latency, as a fraction of it; empty for the point `original`."""
    bytes: int
    """Size of the file, in bytes."""
    macs: int
    """Multiply-accumulate operations for one image."""
    steps: int = 0
    """Optimizer steps of its training."""
    seconds: float = 0.0
    """Time of its training, in seconds."""

    @property
    def mean_ms(self) -> float:
        """Geometric mean of the latencies."""
        return math.exp(sum(map(math.log, self.latency_ms.values())) / len(self.latency_ms))

    def milliseconds(self, size: int) -> str:
        """The latency at a batch size and its error: "0.685 ± 0.021"."""
        value = self.latency_ms[size]
        places = max(0, 2 - math.floor(math.log10(value)))
        error = math.ceil(10**places * value * self.latency_error.get(size, 0.0)) / 10**places
        return f"{value:.{places}f}" + (f" ± {error:.{places}f}" if error else "")

    @property
    def latencies(self) -> str:
        """All latencies: "0.685 ± 0.021 ms at batch 1, 40.1 ± 0.9 ms at batch 128"."""
        return ", ".join(f"{self.milliseconds(size)} ms at batch {size}" for size in self.latency_ms)


def like(point: Point, other: Point) -> Point:
    """A copy of the point. Latencies and size that are equal to those of `other` get the values of `other`.

    Sizes are equal if they differ by less than 1 %, latencies if the 95 % interval of their ratio contains 1.
    """
    latency = {
        size: other.latency_ms[size] if _same_latency(point, other, size) else value
        for size, value in point.latency_ms.items()
    }
    large, small = max(point.bytes, other.bytes), min(point.bytes, other.bytes)
    same = large - small < SAME_SIZE * large
    return point.model_copy(update={"latency_ms": latency, "bytes": other.bytes if same else point.bytes})


def _same_latency(point: Point, other: Point, size: int) -> bool:
    error = math.hypot(point.latency_error.get(size, 0.0), other.latency_error.get(size, 0.0))
    return abs(math.log(point.latency_ms[size] / other.latency_ms[size])) <= error


def dominates(first: Point, second: Point) -> bool:
    """Whether `first` is at least as good as `second` in everything, and better in something; see `like`."""
    return covers(first, second) and _costs(like(first, second)) != _costs(second)


def _costs(point: Point) -> list[float]:
    return [-point.validation, *(point.latency_ms[size] for size in sorted(point.latency_ms)), point.bytes]


def front(points: Iterable[Point], best: Point | None = None) -> list[Point]:
    """The points that no other point on the front dominates or equals, from the fastest to the slowest.

    Points are considered from the best metric to the worst, and points with the same metric in the given order. Each is
    compared with the points kept so far. So the first of equal points is kept, and small differences do not add up.
    The point `best` is always on the front.
    """
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: -point.validation):
        if not any(covers(each, point) for each in kept):
            kept = [each for each in kept if not dominates(point, each)] + [point]
    if best is not None and all(each.name != best.name for each in kept):
        kept.append(best)
    return sorted(kept, key=lambda point: point.mean_ms)


def covers(first: Point, second: Point) -> bool:
    """Whether `first` is at least as good as `second` in everything; see `like`."""
    return all(a <= b for a, b in zip(_costs(like(first, second)), _costs(second), strict=True))


def violations(point: Point, budget: Budget, original: float) -> dict[str, float]:
    """The limits that a point exceeds, with the ratio to the limit (latency, size) or the points above it (metric).

    Args:
        point: the point.
        budget: the limits.
        original: metric of the original network on the validation images.
    """
    lacking: dict[str, float] = {}
    if budget.points is not None and original - point.validation > budget.points + 1e-9:
        lacking["drop"] = original - point.validation - budget.points
    for size, limit in budget.latency_ms.items():
        if size in point.latency_ms and point.latency_ms[size] > limit:
            lacking[f"latency {size}"] = point.latency_ms[size] / limit
    if budget.megabytes is not None and point.bytes > 1e6 * budget.megabytes:
        lacking["size"] = point.bytes / 1e6 / budget.megabytes
    return lacking


def share_of_budget(point: Point, budget: Budget, original: float) -> str:
    """What a point uses of each limit, in words."""
    texts: list[str] = []
    if budget.points is not None:
        lost = max(0.0, original - point.validation)
        texts.append(f"{lost:.2f} points lost on the validation images ({budget.points:g} allowed)")
    for size, limit in budget.latency_ms.items():
        texts.append(f"{point.milliseconds(size)} ms at batch {size} (limit {limit:g} ms)")
    if budget.megabytes is not None:
        texts.append(f"{point.bytes / 1e6:.3f} MB (limit {budget.megabytes:g} MB)")
    return ", ".join(texts)


def reason(point: Point, budget: Budget, *, met: bool) -> str:
    """Why `rank` chose a point, in words."""
    sizes = " and ".join(map(str, point.latency_ms))
    mean = " (geometric mean)" if len(point.latency_ms) > 1 else ""
    if not met:
        return "Chosen because it is closest to the budget."
    if budget.points is None:
        return "Chosen because it has the best metric on the validation images within the budget."
    return f"Chosen because, of the networks within the budget, it has the lowest latency at batch {sizes}{mean}."


def distance(lacking: dict[str, float]) -> float:
    """How far a point is from a budget: one point of the metric counts as much as 10 % of latency or size."""
    return sum(value if name == "drop" else 10 * math.log(value) for name, value in lacking.items())


def rank(point: Point, budget: Budget, original: float) -> tuple[float, ...]:
    """A sort key, smaller for better points. The distance from the budget comes first.

    Then, with a limit on the drop: latency, size, metric. Without one: metric, latency, size.
    """
    lacking = distance(violations(point, budget, original))
    if budget.points is None:
        return lacking, -point.validation, point.mean_ms, point.bytes
    return lacking, point.mean_ms, point.bytes, -point.validation


def pick(points: Sequence[Point], budget: Budget, original: float) -> Point:
    """The best point within the budget, or the nearest to it; of equal points the first.

    The criteria of `rank` are applied one after another. Points equal to the best one (see `like`) go on to the next
    criterion.
    """
    kept = [point for point in points if not violations(point, budget, original)] or list(points)
    for step in range(len(rank(kept[0], budget, original))):
        best = min(kept, key=lambda point: rank(point, budget, original)[step])
        kept = [
            point
            for point in kept
            if rank(like(point, best), budget, original)[step] <= rank(best, budget, original)[step]
        ]
    return kept[0]


def shortfall(point: Point, budget: Budget, original: float) -> str:
    """The limits that a point exceeds, in words; empty if it meets the budget."""
    texts: list[str] = []
    for name, value in violations(point, budget, original).items():
        if name == "drop":
            texts.append(f"it loses {original - point.validation:.2f} points, {value:.2f} more than allowed")
        elif name == "size":
            texts.append(f"it is {point.bytes / 1e6:.3f} MB, {_excess(value)}")
        else:
            size = int(name.removeprefix("latency "))
            inside = math.log(value) <= point.latency_error.get(size, 0.0)
            text = f"it takes {point.milliseconds(size)} ms at batch {size}, {_excess(value)}"
            texts.append(text + (", within the measurement error" if inside else ""))
    return "; ".join(texts)


def _excess(ratio: float) -> str:
    return f"{ratio:.2f} times the limit" if ratio > 1.05 else f"{100 * (ratio - 1):.2f} % above the limit"
