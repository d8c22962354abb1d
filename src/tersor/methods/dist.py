"""DIST: maximizes the correlation of student and teacher probabilities within each image and within each class.

Huang, You, Wang, Qian and Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022.

    p = softmax(z / T), logits z (N, classes) or (N, classes, ...);  d(a, b) = 1 - Pearson's correlation of two vectors
    inter = T^2 * mean over the N images of d(p_student[i, :], p_teacher[i, :])
    intra = T^2 * mean over the classes of d(p_student[:, j], p_teacher[:, j])
    L     = beta * inter + gamma * intra + label_weight * CE

Correlation compares the relations between predictions, not their values, so that the student can learn from a much
stronger teacher. The authors' code multiplies by T^2; the paper's formula has T = 1, where both agree. As in their code
for segmentation, each pixel or position counts as an image. Where the task has independent classes (multilabel), p is
sigmoid(z / T).
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from tersor.core.plain_values import plain_dataclass
from tersor.data.batch import Batch
from tersor.training.attachment import Attachment, without_loss
from tersor.training.class_logits import by_position, logits_of_both, require_logits
from tersor.training.context import AttachContext
from tersor.training.layer_pairs import require_teacher
from tersor.training.method import PLAIN_VALUES
from tersor.training.objective import LossTerm, Outputs

_EPSILON = 1e-8


def correlation_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - Pearson's correlation of the rows of two matrices (N, M), averaged over N."""
    ours, theirs = (values - values.mean(1, keepdim=True) for values in (student, teacher))
    return 1 - ((ours * theirs).sum(1) / (ours.norm(dim=1) * theirs.norm(dim=1) + _EPSILON)).mean()


class CorrelationTerm(LossTerm):
    """The weighted correlation distances, within images and within classes."""

    name = "dist"

    def __init__(self, method: DIST) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The loss of one batch; labels are not used."""
        method = self.method
        probabilities = torch.sigmoid if student.context.task.independent_classes else partial(torch.softmax, dim=1)
        logits = logits_of_both(student, teacher, self.name)
        ours, theirs = (probabilities(by_position(each) / method.temperature) for each in logits)
        inter, intra = correlation_distance(ours, theirs), correlation_distance(ours.T, theirs.T)
        return method.temperature**2 * (method.beta * inter + method.gamma * intra)


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class DIST:
    """Maximizes the correlation with the teacher's predictions; suited to a much stronger teacher (DIST)."""

    needs_teacher: ClassVar[bool] = True
    needs_steps: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"beta": 0.5, "gamma": 1.5, "temperature": 2.0}
    off: ClassVar[dict[str, Any]] = {"beta": 0.0, "gamma": 0.0}

    beta: Annotated[float, Field(ge=0, description="weight of the distance within images")] = 1.0
    gamma: Annotated[float, Field(ge=0, description="weight of the distance within classes")] = 1.0
    temperature: Annotated[float, Field(gt=0, description="temperature T of the softmax")] = 4.0
    label_weight: Annotated[float, Field(ge=0, description="weight of the task's loss on the labels")] = 1.0

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Add the loss; changes nothing in `model`.

        Raises:
            InputError: there is no teacher, or the task has no logits.
        """
        teacher = require_teacher(context.teacher, "dist")
        require_logits(context, "dist", student=model, teacher=teacher)
        if not self.beta and not self.gamma:
            return without_loss(model, self.label_weight)
        return Attachment(model, [CorrelationTerm(self)], self.label_weight)
