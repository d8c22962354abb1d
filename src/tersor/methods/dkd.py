"""Decoupled knowledge distillation (DKD): target class and non-target classes are distilled with separate weights.

Zhao, Cui, Song, Qiu and Liang, "Decoupled Knowledge Distillation", CVPR 2022.

    p_T = softmax(z / T), logits z (N, classes) or (N, classes, ...), target class t
    TCKD = T^2 * KL of (p_t, 1 - p_t), teacher to student
    NCKD = T^2 * KL of softmax(z / T) over the classes other than t, teacher to student
    L    = warm-up * (alpha * TCKD + beta * NCKD) + CE

Weighted by 1 and 1 - p_t (p_t of the teacher), the two terms add up to the usual soft-target loss. The authors' code
removes the target class by subtracting 1000 from its logit, and takes the logarithm of a probability that may be 0.
Here the log-probabilities of both terms are computed with log-sum-exp, which is equivalent and cannot underflow. As in
the code, the weight rises linearly at first: in the code over 20 of 240 epochs, here over a fraction of the stage.

The paper classifies images. Here each pixel or position of logits (N, classes, ...) counts as an image; pixels without
a class (the task's `ignore_index`) are left out. Tasks without one target class for each position are rejected.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.core.plain_values import plain_dataclass
from tersor.data.batch import Batch
from tersor.training.attachment import Attachment, without_loss
from tersor.training.class_logits import (
    logits_of_both,
    require_class_targets,
    require_logits,
    rows_with_class,
)
from tersor.training.context import AttachContext
from tersor.training.layer_pairs import require_teacher
from tersor.training.loss_warmup import WarmupAttachment, WarmupLossTerm
from tersor.training.method import PLAIN_VALUES
from tersor.training.objective import Outputs


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of logits (rows, classes) with labels (rows,), each a scalar, times T^2."""
    target = F.one_hot(labels, student.shape[1]).bool()
    ours, theirs = (_decoupled_log_probabilities(logits / temperature, target) for logits in (student, teacher))
    tckd = F.kl_div(ours[0], theirs[0], log_target=True, reduction="batchmean")
    nckd = F.kl_div(ours[1], theirs[1], log_target=True, reduction="batchmean")
    return temperature**2 * tckd, temperature**2 * nckd


def _decoupled_log_probabilities(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (rows, 2) of target class and all others, and (rows, classes - 1) among the others."""
    others = logits[~target].reshape(len(logits), -1)
    total = torch.logsumexp(others, 1)
    pair = torch.stack([logits[target], total], 1)
    return F.log_softmax(pair, 1), others - total[:, None]


class DecoupledTerm(WarmupLossTerm):
    """The weighted sum of TCKD and NCKD."""

    name = "dkd"

    def __init__(self, method: DKD) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The loss of one batch."""
        if batch.targets is None:
            raise InputError(
                "dkd needs the target class of every image, and the images have no labels. Pass labeled images."
            )
        logits = logits_of_both(student, teacher, self.name)
        rows = rows_with_class(*logits, batch.targets, student.context.task)
        tckd, nckd = decoupled(*rows, self.method.temperature)
        return self.warmup * (self.method.alpha * tckd + self.method.beta * nckd)


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class DKD:
    """Distills target-class and non-target-class probabilities with separate weights (decoupled distillation)."""

    needs_teacher: ClassVar[bool] = True
    needs_steps: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True
    needs_classes: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"alpha": 0.5, "beta": 2.0, "temperature": 2.0, "warmup": 0.5}
    off: ClassVar[dict[str, Any]] = {"alpha": 0.0, "beta": 0.0}

    alpha: Annotated[float, Field(ge=0, description="weight of the target class (TCKD)")] = 1.0
    beta: Annotated[float, Field(ge=0, description="weight of the non-target classes (NCKD)")] = 8.0
    temperature: Annotated[float, Field(gt=0, description="temperature T of the softmax")] = 4.0
    label_weight: Annotated[float, Field(ge=0, description="weight of the task's loss on the labels")] = 1.0
    warmup: Annotated[float, Field(ge=0, lt=1, description="fraction of the stage over which the weight rises")] = 0.08

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Add the loss; changes nothing in `model`.

        Raises:
            InputError: there is no teacher, the task has no logits, or no target class.
        """
        teacher = require_teacher(context.teacher, "dkd")
        require_logits(context, "dkd", student=model, teacher=teacher)
        require_class_targets(context, "dkd")
        if not self.alpha and not self.beta:
            return without_loss(model, self.label_weight)
        steps = round(self.warmup * context.steps)
        return WarmupAttachment(model, DecoupledTerm(self), steps=steps, label_weight=self.label_weight)
