"""The points of the front and the free baselines on the test images, at the end of a search."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.core.files import read_json, write_file
from tersor.evaluation.scoring import agreement
from tersor.evaluation.standard_error import error_of_drop
from tersor.search import search_metric
from tersor.search.candidate import ORIGINAL
from tersor.search.folder import TESTED
from tersor.search.front import Point
from tersor.search.search_context import Search
from tersor.tasks.classification import Classification
from tersor.tasks.task import Task

MOST_CLASSES = 100
"""Largest number of classes whose scores are kept."""


@dataclass(frozen=True)
class Tested:
    """What the page shows of a point's predictions for the test images.

    Attributes:
        metric: the metric in percent.
        agreement: agreement with the original, in percent; None if the outputs have another size because the image size
            was changed.
        by_class: scores in percent, None for a class that does not occur.
        classes: predicted class indices (N,), int64; None for tasks other than classification.
        drop_error: one standard error of the difference from the original, in points.
    """

    metric: float
    agreement: float | None
    by_class: list[float | None]
    classes: Tensor | None = None
    drop_error: float = 0.0


def run_on_test_images(search: Search) -> dict[str, Tested]:
    """Add the metric on the test images to the points that are tested at the end.

    Points that were tested at an earlier end of the search are not run again, except the original if its predictions
    are needed and were not kept. Only the predictions of the original and of one other point are in memory at once.
    """
    assert search.original is not None
    original, points = search.original.name, search.tested_at_the_end()
    known = {name: each for name, each in _read(search.folder.path).items() if name in {each.name for each in points}}
    new = [point for point in points if point.name not in known]
    if new and original in known and known[original].classes is None:
        new += [point for point in points if point.name == original]
    reference: Any = known[original].classes if original in known else None
    state = search.folder.state
    if new:
        state.test_runs.append([])
    for point in sorted(new, key=lambda point: point.name != original):
        state.test_runs[-1].append(point.name)  # counted before it runs, since the process may be killed
        search.save()
        predictions, targets = search.bench.test_predictions(
            search.candidate_of(point), search.folder.path / point.file
        )
        reference = predictions if point.name == original else reference
        known[point.name] = _tested(search, point, predictions, targets, reference)
        _write(search.folder.path, known)
    search.points = [
        each.model_copy(update={"test": known[each.name].metric, "test_drop_error": known[each.name].drop_error})
        if each.name in known
        else each
        for each in search.points
    ]
    return known


def _tested(search: Search, point: Point, predictions: Any, targets: Any, reference: Any) -> Tested:
    experiment = search.bench.experiment
    task, classes = experiment.task, len(experiment.data.classes)
    classifies = isinstance(task, Classification)
    comparable = classifies or search.candidate_of(point).pixels is None
    measured = search_metric.measured(task, predictions, targets)
    right = search_metric.measured(task, reference, targets).right if classifies else None
    return Tested(
        measured.metric,
        agreement(task, predictions, reference) if comparable else None,
        _by_class(task, predictions, targets, classes) if comparable else [],
        predictions if classifies else None,
        0.0
        if point.name == ORIGINAL
        else error_of_drop(measured.right, right, measured.metric, len(experiment.data.test)),
    )


def _read(folder: Path) -> dict[str, Tested]:
    """The points that earlier ends of the search have tested."""
    if not (folder / TESTED).is_file():
        return {}
    kept: dict[str, Any] = read_json(folder / TESTED, "Choose another folder with out=... (`--out`).")
    return {
        name: Tested(metric, with_original, by_class, None if classes is None else torch.tensor(classes), drop_error)
        for name, (metric, with_original, by_class, classes, drop_error) in kept.items()
    }


def _write(folder: Path, tested: Mapping[str, Tested]) -> None:
    """Keep all tested points, those of earlier ends included."""
    plain = {
        name: [
            each.metric,
            each.agreement,
            each.by_class,
            None if each.classes is None else each.classes.tolist(),
            each.drop_error,
        ]
        for name, each in {**_read(folder), **tested}.items()
    }
    write_file(folder / TESTED, json.dumps(plain).encode())


def _by_class(task: Task, predictions: Any, targets: Any, classes: int) -> list[float | None]:
    scores = task.score_by_class([(predictions, targets)], classes) if classes else None
    values: list[float] = [] if scores is None else scores[:MOST_CLASSES].tolist()
    return [None if math.isnan(value) else round(value, 2) for value in values]
