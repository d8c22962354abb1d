"""The training of `tersor.distill`: a student learns from the outputs of a teacher."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from tersor.core.device import precision_for
from tersor.core.errors import CompressionWarning
from tersor.core.progress import ProgressReporter
from tersor.data.loader import Loader, batches_of
from tersor.graph.eval_mode import evaluating
from tersor.graph.forward_call import run
from tersor.graph.fused_inference import fused
from tersor.methods.soft_targets import SoftTargets
from tersor.pipeline.task_arguments import labelled, task_of_both
from tersor.tasks.task import Task
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.loop import fit
from tersor.training.options import Training
from tersor.training.output_distance import OutputDistance
from tersor.training.precision import with_usable_precision
from tersor.training.schedule import steps_per_epoch
from tersor.training.teacher_check import IMAGES as TEACHER_IMAGES
from tersor.training.teacher_check import teacher_warnings

_FEW = 8


def train_on_outputs(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    method: SoftTargets,
    training: Training,
    *,
    epochs: int,
    task: Task | None,
    progress: ProgressReporter | None,
) -> nn.Module:
    """Train the student on softened logits or, where there are none, on the distance from the teacher's outputs.

    Raises:
        InputError: student, teacher, task and batches do not match, or a loss is not finite.

    Warns:
        CompressionWarning: the teacher may be unsuitable, or a network does not run in bfloat16.
    """
    loader, first = batches_of(loader)
    few = first[:_FEW].to(next(teacher.parameters()).device)
    task, classes = task_of_both(task, student, teacher, first)
    with_targets = bool(method.label_weight) and not task.from_original
    batches = Loader(loader, classes if with_targets else None, targets=with_targets)
    if classes is not None:
        for doubt in teacher_warnings("the teacher", teacher, labelled(loader, classes, TEACHER_IMAGES)):
            _warn(doubt, stacklevel=4)
    with evaluating(teacher), torch.no_grad():
        soft = task.logits(run(teacher, few.clone())) is not None
    if soft:
        attached = method.attach(student, AttachContext(teacher=teacher, task=task))
    else:
        attached = Attachment(student, [OutputDistance(method.loss_weight)], method.label_weight * with_targets)
    networks = {"the student": student, "the teacher": teacher}
    training = with_usable_precision(training, networks, few, partial(_warn, stacklevel=5))
    precision = precision_for(few.device, training.precision)
    steps = epochs * steps_per_epoch(batches, training)
    learning = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    try:
        with evaluating(teacher):
            fit(
                attached,
                batches,
                training,
                steps=steps,
                teacher=fused(teacher, few, precision=precision),
                progress=progress,
                task=task,
                origin="call",
            )
    finally:
        for parameter in learning:
            parameter.requires_grad = True
    return attached.model


def _warn(message: str, stacklevel: int) -> None:
    warnings.warn(message, CompressionWarning, stacklevel=stacklevel)
