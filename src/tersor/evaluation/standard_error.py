"""Standard errors of a metric in percent, and of its difference from the original on the same images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersor.tasks.classification import Classification
from tersor.tasks.functions import FromFunctions
from tersor.tasks.task import Task

SEEN = 3.0
"""A network was trained on the validation images if its metric on them exceeds that on the test images by more than
this number of standard errors."""


def right_of(task: Task, predictions: Any, targets: Any) -> NDArray[np.bool_] | None:
    """Whether the class of each image is right (N,); None if the metric is not the accuracy."""
    return (predictions == targets).numpy() if measures_accuracy(task) else None


def measures_accuracy(task: Task) -> bool:
    """Whether the metric is the share of correctly classified images."""
    if isinstance(task, FromFunctions):
        return bool(task.unit) and measures_accuracy(task.base)
    own = (type(task).score, type(task).predictions) != (Classification.score, Classification.predictions)
    return isinstance(task, Classification) and not own


def standard_error(metric: float, images: int) -> float:
    """One standard error of a metric in percent on this many images, computed as for a proportion of the images."""
    share = min(max(metric / 100, 1 / (images + 2)), 1 - 1 / (images + 2))
    return 100 * math.sqrt(share * (1 - share) / images)


def error_of_difference(metrics: tuple[float, float], images: tuple[int, int]) -> float:
    """One standard error of the difference of a metric in percent between two sets of images, for the same network.

    It is computed as in the two-proportion z-test: the proportion is pooled over both sets, because the null hypothesis
    is that they are equal. With separate proportions, 1 % of all tests at three standard errors would be false alarms
    where few images are wrong.

    Args:
        metrics: the metric on each set, in percent.
        images: number of images of each set.
    """
    pooled = sum(metric * count for metric, count in zip(metrics, images, strict=True)) / sum(images)
    return standard_error(pooled, sum(images)) * math.sqrt(sum(images) * sum(1 / count for count in images))


def error_of_drop(
    right: NDArray[np.bool_] | None, original: NDArray[np.bool_] | None, metric: float, images: int
) -> float:
    """One standard error of the difference from the original, in points.

    Both classify the same images, so only images that one of them classifies wrongly count, as in McNemar's test. For
    other metrics, it is the standard error of the metric itself.

    Args:
        right: whether the class of each image is right (N,).
        original: the same for the original (N,).
        metric: the metric in percent, for metrics other than the accuracy.
        images: N.
    """
    if right is None or original is None or len(right) != len(original):
        return standard_error(metric, images)
    changes = right.astype(np.float64) - original.astype(np.float64)
    return 100 * float(np.append(changes, [1.0, -1.0]).std()) / math.sqrt(images)  # two more images: never exactly 0
