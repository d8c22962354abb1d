"""Values of the report's sections on training: masks and validation accuracy by step, and psgd's grid positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from tersor.report.charts import Columns
from tersor.report.templating import number
from tersor.report.verdict import Numbers

Points = Sequence[tuple[int, float]]

_LAST = 5
"""Validations at the end of a stage whose spread is shown."""


@dataclass(frozen=True)
class StageCurves:
    """Curves of one stage over its steps.

    Attributes:
        name: of the stage.
        steps: the length of the axis.
        masks: of each method that updated masks, `sparsity` and `changed` (fractions).
        accuracies: of the validations, in percent.
        spread: of the last validations; empty where there are too few.
    """

    name: str
    steps: int
    masks: Sequence[Mapping[str, Points]]
    accuracies: Points
    spread: str


@dataclass(frozen=True)
class TrainingCurves:
    """Curves of all stages, with their common scales; a scale is None where no stage has such a curve."""

    stages: Sequence[StageCurves]
    largest_change: float | None
    accuracy_range: tuple[float, float] | None


def training_curves(numbers: Numbers) -> TrainingCurves:
    """Curves of the stages that updated masks or validated during training."""
    every = [_stage_curves(stage) for stage in numbers["stages"] if stage["steps"]]
    stages = [each for each in every if each.masks or each.accuracies]
    changes = [value for each in stages for masks in each.masks for _, value in masks["changed"]]
    accuracies = [value for each in stages for _, value in each.accuracies]
    accuracy_range = (min(accuracies), max(accuracies)) if accuracies else None
    return TrainingCurves(stages, max(changes, default=None), accuracy_range)


def _stage_curves(stage: Mapping[str, Any]) -> StageCurves:
    masks = [
        {kind: list(zip(log["steps"], log[kind], strict=True)) for kind in ("sparsity", "changed")}
        for log in stage.get("masks", ())
        if log["steps"]
    ]
    accuracies = list(zip(stage.get("validated_at", ()), stage.get("validation_by_epoch", ()), strict=True))
    last = [value for _, value in accuracies[-_LAST:]]
    spread = (
        f"last {_LAST} of {len(accuracies)} validations: mean {mean(last):.2f} %, standard deviation {stdev(last):.2f}"
        if len(last) == _LAST
        else ""
    )
    return StageCurves(stage["name"], stage["steps"], masks, accuracies, spread)


def position_histogram(positions: Mapping[str, Any]) -> dict[str, Any]:
    """Positions of weights between two grid points, as `charts.histogram_paths` takes them."""
    width = 1 / len(positions["before"])
    return {
        "low": -0.5, "width": width, "after_width": width, "before": positions["before"], "after": positions["after"],
    }  # fmt: skip


def movement_columns(means: Sequence[float | None]) -> Columns:
    """Mean movement by initial distance to the nearest grid point."""
    width = 0.5 / len(means)
    return [
        (
            f"initial distance {index * width:.2f} to {(index + 1) * width:.2f} steps: moved",
            {} if mean is None else {"artifact": mean},
        )
        for index, mean in enumerate(means)
    ]


def describe_movement(means: Sequence[float | None]) -> str:
    """The movement of the weights closest to a grid point, and of those farthest from one."""
    known = [mean for mean in means if mean is not None]
    return f"closest to a point: moved by {number(known[0])} steps; farthest: by {number(known[-1])}"


def error_columns(errors: Sequence[float]) -> Columns:
    """Reconstruction error by epoch."""
    return [
        (f"epoch {epoch} of {len(errors)}: {100 * error:.1f} %", {"teacher": error})
        for epoch, error in enumerate(errors, 1)
    ]
