"""The points of the front and the free baselines on the test images, at the end of a search."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tersor.evaluation.scoring import agreement
from tersor.search import search_metric
from tersor.search.search_context import Search
from tersor.tasks.classification import Classification
from tersor.tasks.task import Task

MOST_CLASSES = 100
"""Classes whose scores are kept."""


@dataclass(frozen=True)
class Tested:
    """What the page shows of a point's predictions for the test images.

    Attributes:
        agreement: with the original, in percent; None for outputs that have the size of other images.
        by_class: scores in percent, None for a class that does not occur.
        classes: predicted class numbers (N,), int64; None for other tasks than classification.
    """

    agreement: float | None
    by_class: list[float | None]
    classes: Tensor | None = None


def run_on_test_images(search: Search) -> dict[str, Tested]:
    """Add the metric on the test images to the points that are tested at the end.

    Only the predictions of the original and of one other point are in memory at the same time.
    """
    task, classes = search.bench.experiment.task, len(search.bench.experiment.data.classes)
    assert search.original is not None
    original, found = search.original.name, dict[str, Tested]()
    reference: Any = None
    for point in sorted(search.tested_at_the_end(), key=lambda point: point.name != original):
        candidate = search.candidate_of(point)
        predictions, targets = search.bench.test_predictions(candidate, search.folder.path / point.file)
        reference = predictions if point.name == original else reference
        metric = search_metric.measured(task, predictions, targets).metric
        tested = point.model_copy(update={"test": metric})
        search.points = [tested if each.name == point.name else each for each in search.points]
        classifies = isinstance(task, Classification)
        comparable = classifies or candidate.pixels is None
        found[point.name] = Tested(
            agreement(task, predictions, reference) if comparable else None,
            _by_class(task, predictions, targets, classes) if comparable else [],
            predictions if classifies else None,
        )
    search.folder.state.test_runs.append(list(found))
    return found


def _by_class(task: Task, predictions: Any, targets: Any, classes: int) -> list[float | None]:
    scores = task.score_by_class([(predictions, targets)], classes) if classes else None
    values: list[float] = [] if scores is None else scores[:MOST_CLASSES].tolist()
    return [None if math.isnan(value) else round(value, 2) for value in values]
