"""The metric that the search maximizes: that of the task, in percent. No other module of the search computes it."""

from __future__ import annotations

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
from tersor.evaluation.standard_error import right_of
from tersor.pipeline.experiment import Experiment
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
    return Measured(in_percent(task, score(task, predictions, targets)), right_of(task, predictions, targets))


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
