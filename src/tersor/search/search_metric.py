"""The metric that the search maximizes: that of the task, in percent. No other module of the search computes it."""

from __future__ import annotations

import math
from pathlib import Path

from tersor.core.errors import InputError
from tersor.data import Batches
from tersor.evaluation.measurement import arrays
from tersor.evaluation.scoring import file_predictions, score, targets_of
from tersor.evaluation.session import open_session
from tersor.pipeline.experiment import Experiment
from tersor.tasks.task import Task


def of_file(file: Path, runtime: str, batches: Batches, experiment: Experiment, precision: str | None = None) -> float:
    """The metric of a file in a runtime.

    Raises:
        InputError: the runtime cannot run the file.
    """
    task, session = experiment.task, open_session(file, runtime, precision=precision)
    predictions = file_predictions(session, arrays(batches, experiment.recipe.target.input), task)
    return score(task, predictions, targets_of(batches))


def refuse_other_metrics(task: Task) -> None:
    """Check that a search can maximize the metric of the task.

    Raises:
        InputError: the metric is not a percentage, is better when lower, or needs the original's outputs.
    """
    if not task.higher_is_better or task.unit != "%" or task.from_original:
        raise InputError(
            f"a search needs a metric in percent that is better when higher; this task has {task.metric}. "
            "Possible: classification, multilabel, segmentation, detection, or package.module:Task."
        )


def standard_error(metric: float, images: int) -> float:
    """One standard error of a metric in percent on this many images, computed as for a share of the images."""
    share = min(max(metric / 100, 1 / (images + 2)), 1 - 1 / (images + 2))
    return 100 * math.sqrt(share * (1 - share) / images)
