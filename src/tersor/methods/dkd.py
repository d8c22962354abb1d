"""Decoupled distillation: the teacher's answer on the right class, and its answers among the others, weighed apart.

Zhao, Cui, Song, Qiu and Liang, "Decoupled Knowledge Distillation", CVPR 2022.

    p_T = softmax(z / T), logits z (N, classes), right class t
    TCKD = T^2 * KL of (p_t, 1 - p_t), teacher to student
    NCKD = T^2 * KL of softmax(z / T) over the classes other than t, teacher to student
    L    = warm-up * (alpha * TCKD + beta * NCKD) + CE

The sum of the two with weights 1 and 1 - p_t of the teacher is the ordinary soft target. The authors' code takes the
right class out by subtracting 1000 from its logit, and the logarithm of a probability that may be 0; here both
come from log-sum-exp, which is the same and cannot underflow. As in the code, the weight rises linearly over the first
epochs: 20 of 240, here a fraction of the stage.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.data.batch import Batch
from tersor.training.attachment import Attachment, without_loss
from tersor.training.context import AttachContext
from tersor.training.layer_pairs import require_teacher
from tersor.training.loss_warmup import WarmupAttachment, WarmupLossTerm
from tersor.training.method import PLAIN_VALUES
from tersor.training.objective import Outputs


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of logits (N, classes) with labels (N,), each a scalar, times T^2."""
    right = F.one_hot(labels, student.shape[1]).bool()
    ours, theirs = (_right_and_others(logits / temperature, right) for logits in (student, teacher))
    target = F.kl_div(ours[0], theirs[0], log_target=True, reduction="batchmean")
    others = F.kl_div(ours[1], theirs[1], log_target=True, reduction="batchmean")
    return temperature**2 * target, temperature**2 * others


def _right_and_others(logits: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, 2) of the right class against all others, and (N, classes - 1) among the others."""
    others = logits[~right].reshape(len(logits), -1)
    of_others = torch.logsumexp(others, 1)
    pair = torch.stack([logits[right], of_others], 1)
    return F.log_softmax(pair, 1), others - of_others[:, None]


class DecoupledTerm(WarmupLossTerm):
    """The weighted sum of both parts."""

    name = "dkd"

    def __init__(self, method: DKD) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The loss of one batch."""
        assert teacher is not None
        if batch.labels is None:
            raise InputError("dkd asks which class is the right one, and the images have no labels. Give labels.")
        target, others = decoupled(student.logits, teacher.logits, batch.labels, self.method.temperature)
        return self.warmup * (self.method.alpha * target + self.method.beta * others)


@dataclass(frozen=True, config=PLAIN_VALUES)
class DKD:
    """Soft targets, with the right class and the others weighed apart."""

    needs_teacher: ClassVar[bool] = True
    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"alpha": 0.5, "beta": 2.0, "temperature": 2.0, "warmup": 0.5}
    off: ClassVar[dict[str, Any]] = {"alpha": 0.0, "beta": 0.0}

    alpha: Annotated[float, Field(ge=0, description="weight of the right class")] = 1.0
    beta: Annotated[float, Field(ge=0, description="weight of the others")] = 8.0
    temperature: Annotated[float, Field(gt=0, description="T")] = 4.0
    label_weight: Annotated[float, Field(ge=0, description="factor on the labels' cross entropy")] = 1.0
    warmup: Annotated[float, Field(ge=0, lt=1, description="fraction of the stage over which the weight rises")] = 0.08

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Adds the loss; changes nothing in `model`.

        Raises:
            InputError: there is no teacher.
        """
        require_teacher(context.teacher, "dkd")
        if not self.alpha and not self.beta:
            return without_loss(model, self.label_weight)
        rising = round(self.warmup * context.steps)
        return WarmupAttachment(model, DecoupledTerm(self), steps=rising, label_weight=self.label_weight)
