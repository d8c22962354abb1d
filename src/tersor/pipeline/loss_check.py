"""The losses of every stage, computed once before any training."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from tersor.core.errors import InputError, not_finite
from tersor.data.batch import Batch
from tersor.data.batch_errors import explain_batchnorm_error
from tersor.graph.eval_mode import modes_restored
from tersor.pipeline.experiment import Experiment
from tersor.recipe import Stage
from tersor.training.attachment import Attachment, Chain
from tersor.training.objective import Objective

_FEW = 2
"""Images of the first attempt: every task and method of tersor can compute its loss for two."""


def check_losses(experiment: Experiment, rehearsal: Experiment, stage: Stage, attachment: Chain) -> None:
    """Compute the losses of a stage for one batch, so that a loss that fails is found before training.

    Two images are tried first. A loss may need more, so a loss that fails for two is computed for a whole batch. The
    weights, buffers and modes of the networks stay unchanged. A user-defined method that overrides `begin` is not
    checked: its loss may need what `begin` prepares.

    Args:
        experiment: the experiment with all images.
        rehearsal: the experiment with the few images to which the methods were attached.
        stage: one of its stages.
        attachment: the methods of the stage.

    Raises:
        InputError: a loss fails, is infinite or NaN, or has no gradient.
    """
    if not experiment.steps_of(stage) or not (attachment.terms or attachment.label_weight):
        return
    if any(map(_begins_itself, attachment.parts)):
        return
    task = experiment.task
    teacher = experiment.teacher or (experiment.original if task.from_original else None)
    with _unchanged(attachment.model), _unchanged(teacher), torch.random.fork_rng(devices=[]):
        objective = Objective(
            attachment.model,
            attachment.terms,
            teacher,
            label_weight=attachment.label_weight,
            layers=attachment.layers,
            task=task,
        ).train()
        for module in objective.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.eval()  # in training mode it communicates, which it cannot do with networks on the CPU
        if not _fails(objective, _first(rehearsal, stage, min(_FEW, stage.batch_size))):
            return
        batch = _first(experiment, stage, stage.batch_size)
        if batch.index is not None:
            batch = replace(batch, index=batch.index % len(rehearsal.data.train))
        with explain_batchnorm_error(len(batch.images)):
            _check(objective, batch)


def _check(objective: Objective, batch: Batch) -> None:
    for name, loss in objective(batch).items():
        if not bool(loss.isfinite()):
            raise InputError(not_finite(name, loss.item()))


def _begins_itself(part: Attachment) -> bool:
    return type(part).begin.__module__.partition(".")[0] != "tersor"


def _fails(objective: Objective, batch: Batch) -> bool:
    try:
        _check(objective, batch)
    except Exception:  # the whole batch, which is computed next, raises it again
        return True
    return False


def _first(experiment: Experiment, stage: Stage, images: int) -> Batch:
    return next(iter(experiment.training_batches(stage.model_copy(update={"batch_size": images}))))


@contextmanager
def _unchanged(network: nn.Module | None) -> Generator[None]:
    """Context that restores buffers, modes and `requires_grad` at its end."""
    if network is None:
        yield
        return
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    learning = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        with modes_restored(network):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for parameter, learns in learning:
            parameter.requires_grad = learns
