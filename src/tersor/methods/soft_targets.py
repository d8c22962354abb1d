"""Soft targets: the student learns the teacher's softened answers.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv 1503.02531).

    p_T(z) = softmax(z / T)
    L = loss_weight * T^2 * KL(p_T(z_teacher) || p_T(z_student)) + label_weight * CE(z_student, y)

Logits are (N, classes). KL is summed over the classes and averaged over the batch; the teacher has no gradient. T^2
multiplies the KL term alone: the gradient of soft targets shrinks like 1 / T^2, so without it the weight would
depend on the temperature in silence. The paper prescribes no weights; 0.9 and 0.1 are those of the common
implementations (Zagoruyko's attention-transfer, RepDistiller).

`standardize` (Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024) brings each image's logits to
mean 0 and deviation 1 before they are divided by T, so that a student need not repeat how large the teacher's are. Its
authors take T = 2 and ten times the loss weight, which is not the standardization's doing. They add 1e-7 to the
deviation; a student whose last layer begins at zero, as torchvision's transformers do, then gets a gradient of 1e6.
Here deviations count as 0.01 at least.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tersor.data.batch import Batch
from tersor.training.attachment import Attachment, without_loss
from tersor.training.context import AttachContext
from tersor.training.layer_pairs import require_teacher
from tersor.training.method import PLAIN_VALUES
from tersor.training.objective import LossTerm, Outputs

_LEAST_DEVIATION = 0.01


def standardized(logits: Tensor) -> Tensor:
    """Logits (N, classes), each row with mean 0 and deviation 1; less, where they hardly deviate."""
    return (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True).clamp(min=_LEAST_DEVIATION)


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of logits (N, classes), averaged over the batch."""
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean") * temperature**2


class SoftTargetTerm(LossTerm):
    """The weighted loss on the softened answers."""

    name = "soft_targets"

    def __init__(self, temperature: float, loss_weight: float, standardize: bool = False) -> None:
        super().__init__()
        self.temperature = temperature
        self.loss_weight = loss_weight
        self.standardize = standardize

    def forward(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The loss of one batch; the images' labels are not looked at."""
        assert teacher is not None
        ours, theirs = student.logits, teacher.logits
        if self.standardize:
            ours, theirs = standardized(ours), standardized(theirs)
        return self.loss_weight * soft_target_loss(ours, theirs, self.temperature)


@dataclass(frozen=True, config=PLAIN_VALUES)
class SoftTargets:
    """Soft targets of a teacher (knowledge distillation), beside the labels or without them."""

    needs_teacher: ClassVar[bool] = True
    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"temperature": 2.0, "loss_weight": 0.5, "standardize": True}
    off: ClassVar[dict[str, Any]] = {"loss_weight": 0.0}

    temperature: Annotated[float, Field(gt=0, description="T; larger is flatter: 1 to 20 are common")] = 4.0
    loss_weight: Annotated[
        float, Field(ge=0, description="weight of the soft targets; 0 leaves the labels as they are")
    ] = 0.9
    label_weight: Annotated[
        float, Field(ge=0, description="factor on the labels' cross entropy; 0 needs no labels")
    ] = 0.1

    standardize: Annotated[bool, Field(description="each image's logits to mean 0 and deviation 1 first")] = False

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Adds the loss; changes nothing in `model`.

        Raises:
            InputError: there is no teacher.
        """
        require_teacher(context.teacher, "soft_targets")
        if not self.loss_weight:
            return without_loss(model, self.label_weight)
        return Attachment(
            model, [SoftTargetTerm(self.temperature, self.loss_weight, self.standardize)], self.label_weight
        )
