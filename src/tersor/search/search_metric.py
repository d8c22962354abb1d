"""The metric that the search maximizes: that of the task, in percent. No other module of the search computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersor.core.errors import InputError
from tersor.data import Batches
from tersor.evaluation.measurement import arrays
from tersor.evaluation.scoring import file_predictions, score, targets_of
from tersor.evaluation.session import open_session
from tersor.pipeline.experiment import Experiment
from tersor.tasks.classification import Classification
from tersor.tasks.functions import FromFunctions
from tersor.tasks.task import Task


@dataclass(frozen=True)
class Measured:
    """The metric of a file.

    Attributes:
        metric: the metric in percent.
        right: whether the class of each image is right (N,); None if the metric is not the accuracy.
    """

    metric: float
    right: NDArray[np.bool_] | None = None


def of_file(
    file: Path, runtime: str, batches: Batches, experiment: Experiment, precision: str | None = None
) -> Measured:
    """The metric of a file in a runtime.

    Raises:
        InputError: the runtime cannot run the file, or a user-defined metric is not between 0 and 1.
    """
    predictions = predictions_of(file, runtime, batches, experiment, precision)
    return measured(experiment.task, predictions, targets_of(batches))


def predictions_of(
    file: Path, runtime: str, batches: Batches, experiment: Experiment, precision: str | None = None
) -> Any:
    """The predictions of a file in a runtime for all images.

    Raises:
        InputError: the runtime cannot run the file.
    """
    session = open_session(file, runtime, precision=precision)
    return file_predictions(session, arrays(batches, experiment.recipe.target.input), experiment.task)


def measured(task: Task, predictions: Any, targets: Any) -> Measured:
    """The metric of predictions.

    Raises:
        InputError: a user-defined metric is not between 0 and 1.
    """
    right = (predictions == targets).numpy() if measures_accuracy(task) else None
    return Measured(in_percent(task, score(task, predictions, targets)), right)


def measures_accuracy(task: Task) -> bool:
    """Whether the metric is the share of correctly classified images."""
    if isinstance(task, FromFunctions):
        return bool(task.unit) and measures_accuracy(task.base)
    own = (type(task).score, type(task).predictions) != (Classification.score, Classification.predictions)
    return isinstance(task, Classification) and not own


def in_percent(task: Task, metric: float) -> float:
    """A metric of the task in percent.

    Raises:
        InputError: a user-defined metric is not between 0 and 1.
    """
    if task.unit == "%":
        return metric
    if not 0 <= metric <= 1:
        raise InputError(
            f"the metric {task.metric} returned {metric:g}. A search needs a metric from 0 to 1, where "
            "higher is better. Divide percentages by 100."
        )
    return 100 * metric


def refuse_other_metrics(task: Task) -> None:
    """Check that a search can maximize the metric of the task.

    Raises:
        InputError: the metric is not a percentage, is better when lower, or needs the original's outputs.
    """
    of_the_user = isinstance(task, FromFunctions) and not task.unit
    if not task.higher_is_better or (task.unit != "%" and not of_the_user) or task.from_original:
        raise InputError(
            f"a search needs a metric in percent, where higher is better; this task has {task.metric}. "
            "Possible: classification, multilabel, segmentation, detection, package.module:Task, or a metric of your "
            "own with values from 0 to 1."
        )


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
