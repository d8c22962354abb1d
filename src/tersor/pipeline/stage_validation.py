"""The metric of a network on the validation images, during a stage and after it."""

from __future__ import annotations

from torch import nn

from tersor.core import distributed
from tersor.core.progress import ProgressReporter
from tersor.evaluation.scoring import network_score
from tersor.pipeline.experiment import Experiment
from tersor.recipe import Stage
from tersor.training.schedule import steps_per_epoch
from tersor.training.validation_curve import ValidationCurve


def validation_curve(experiment: Experiment, stage: Stage) -> ValidationCurve | None:
    """The metric on the validation images every few epochs, where the stage has `validate_every`."""
    if stage.validate_every is None:
        return None
    every = stage.validate_every * steps_per_epoch(experiment.training_batches(stage), stage)
    return ValidationCurve(every, lambda network: _validation_score(experiment, network))


def validate(experiment: Experiment, network: nn.Module, name: str, progress: ProgressReporter) -> float | None:
    """The metric on the held-out images; None without them, and in every process but the first."""
    if distributed.rank():
        return None
    if not len(experiment.data.validation):
        progress.say(f"{name}: done (the data has no validation images)")
        return None
    score, task = _validation_score(experiment, network), experiment.task
    progress.say(f"{name}: {task.metric} {task.shown(score)} on {len(experiment.data.validation)} validation images")
    return score


def _validation_score(experiment: Experiment, network: nn.Module) -> float:
    batches = experiment.batches(experiment.data.validation, experiment.evaluation_batch)
    return network_score(network, batches, experiment.task, experiment.original)
