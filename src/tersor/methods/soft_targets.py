"""Soft targets: the student matches the teacher's softened class probabilities.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv 1503.02531).

    p_T(z) = softmax(z / T)
    L = loss_weight * T^2 * KL(p_T(z_teacher) || p_T(z_student)) + label_weight * CE(z_student, y)

Logits are (N, classes), or (N, classes, ...) of pixels or positions, each of which counts as an image. KL is summed
over the classes and averaged over images and positions; the teacher has no gradient. Where the task has independent
classes (multilabel), each class has its own binary distribution: sigmoid(z / T) and 1 - sigmoid(z / T). KL is then also
averaged over the classes, like the binary cross entropy with the labels. Only the KL term is multiplied by T^2. The
gradient of the soft targets decreases as 1 / T^2, so the effective weight would otherwise depend on the temperature.
The paper prescribes no weights; 0.9 and 0.1 are those of the common implementations (Zagoruyko's attention-transfer,
RepDistiller).

`standardize` (Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024) normalizes each image's logits
to mean 0 and standard deviation 1 before dividing by T, so that the student need not match the teacher's logit scale.
The authors also use T = 2 and ten times the loss weight. They add 1e-7 to the standard deviation; a student whose last
layer is initialized with zeros, as in torchvision's transformers, then gets a gradient of 1e6. Here the standard
deviation is clamped to at least 0.01.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.core.plain_values import plain_dataclass
from tersor.data.batch import Batch
from tersor.tasks import name_of
from tersor.training.attachment import Attachment, without_loss
from tersor.training.class_logits import distributions, logits_of_both, require_logits
from tersor.training.context import AttachContext
from tersor.training.layer_pairs import require_teacher
from tersor.training.method import PLAIN_VALUES
from tersor.training.objective import LossTerm, Outputs

_MIN_DEVIATION = 0.01


def standardized(logits: Tensor) -> Tensor:
    """Logits (rows, classes), each row with mean 0 and standard deviation 1; smaller where they are nearly constant."""
    return (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True).clamp(min=_MIN_DEVIATION)


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of logits (rows, classes), averaged over the rows."""
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean") * temperature**2


class SoftTargetTerm(LossTerm):
    """The weighted loss between softened class probabilities."""

    name = "soft_targets"

    def __init__(self, temperature: float, loss_weight: float, standardize: bool = False) -> None:
        super().__init__()
        self.temperature = temperature
        self.loss_weight = loss_weight
        self.standardize = standardize

    def forward(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The loss of one batch; labels are not used."""
        task = student.context.task
        ours, theirs = (distributions(each, task) for each in logits_of_both(student, teacher, self.name))
        if self.standardize:
            ours, theirs = standardized(ours), standardized(theirs)
        return self.loss_weight * soft_target_loss(ours, theirs, self.temperature)


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class SoftTargets:
    """Distills a teacher's softened class probabilities, with or without labels (knowledge distillation)."""

    needs_teacher: ClassVar[bool] = True
    needs_steps: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"temperature": 2.0, "loss_weight": 0.5, "standardize": True}
    off: ClassVar[dict[str, Any]] = {"loss_weight": 0.0}

    temperature: Annotated[float, Field(gt=0, description="temperature T of the softmax; 1 to 20 are common")] = 4.0
    loss_weight: Annotated[float, Field(ge=0, description="weight of the loss; 0 turns it off")] = 0.9
    label_weight: Annotated[
        float, Field(ge=0, description="weight of the task's loss on the labels; with 0, no labels are needed")
    ] = 0.1
    standardize: Annotated[
        bool, Field(description="normalize each image's logits to mean 0 and standard deviation 1")
    ] = False

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Add the loss; changes nothing in `model`.

        Raises:
            InputError: there is no teacher; the task has no logits; `standardize` with independent classes.
        """
        teacher = require_teacher(context.teacher, "soft_targets")
        require_logits(context, "soft_targets", student=model, teacher=teacher)
        if self.standardize and context.task.independent_classes:
            raise InputError(
                f"standardize normalizes the logits of one image over the classes, which are independent in the task "
                f"{name_of(context.task)}. Write standardize: false."
            )
        if not self.loss_weight:
            return without_loss(model, self.label_weight)
        return Attachment(
            model, [SoftTargetTerm(self.temperature, self.loss_weight, self.standardize)], self.label_weight
        )
