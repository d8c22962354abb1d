"""Values of the report's sections on training: masks and validation accuracy by step, psgd's grid positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from tersor.evaluation.metric import Metric
from tersor.evaluation.results import Results
from tersor.report.charts import Groups
from tersor.report.templating import number

Points = Sequence[tuple[int, float]]

_LAST = 5
"""Validations at the end of a stage whose spread is shown."""


class StageCurves(NamedTuple):
    """Curves of one stage over its steps: `sparsity` and `changed` of each method's masks, and validation scores."""

    name: str
    steps: int
    masks: Sequence[Mapping[str, Points]]
    scores: Points


def curves(numbers: Results) -> Iterator[StageCurves]:
    """Return the curves of the stages that updated masks or validated during training."""
    for stage in numbers.stages:
        masks = [
            {kind: list(zip(log["steps"], log[kind], strict=True)) for kind in ("sparsity", "changed")}
            for log in stage.metrics.get("masks", ())
            if log["steps"]
        ]
        scores = list(zip(stage.validated_at, stage.validation_by_epoch, strict=True))
        if stage.steps and (masks or scores):
            yield StageCurves(stage.name, stage.steps, masks, scores)


def describe_spread(metric: Metric, scores: Points) -> str:
    """Mean and standard deviation of the last validations; empty if there are too few."""
    last = [value for _, value in scores[-_LAST:]]
    if len(last) < _LAST:
        return ""
    total = f"last {_LAST} of {len(scores)} validations"
    return f"{total}: mean {metric.shown(mean(last))}, standard deviation {stdev(last):.{metric.digits}f}"


def position_histogram(positions: Mapping[str, Any]) -> dict[str, Any]:
    """Positions of weights between two grid points, as `charts.histogram_paths` takes them."""
    width = 1 / len(positions["before"])
    return {**positions, "low": -0.5, "width": width, "after_width": width}


def movement_groups(means: Sequence[float | None], *, to_grid: bool) -> Groups:
    """Mean movement by initial distance to the nearest grid point, in steps; or from zero, in another unit."""
    width, unit = 0.5 / len(means), " steps" if to_grid else ""
    edges = [f"{index * width:.2f} to {(index + 1) * width:.2f}" for index in range(len(means))]
    return [(f"initial distance {each}{unit}; mean movement", mean) for each, mean in zip(edges, means, strict=True)]


def describe_movement(means: Sequence[float | None], *, to_grid: bool) -> str:
    """The movement of the weights closest to a grid point (or to zero), and of those farthest from one."""
    known = [mean for mean in means if mean is not None]
    point, unit = ("a grid point", " steps") if to_grid else ("zero", "")
    return f"weights closest to {point} moved by {number(known[0])}{unit}, the farthest by {number(known[-1])}"
