"""Attention transfer: the student matches the teacher's spatial attention maps.

Zagoruyko and Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural
Networks via Attention Transfer", ICLR 2017.

    Q(A) = vec(sum_c |A_c|^p) / ||vec(sum_c |A_c|^p)||_2          A: (N, C, H, W), Q: (N, H * W)
    code    L = loss_weight * sum over the layers of mean over (N, H * W) of (Q(A_student) - Q(A_teacher))^2
    paper   L = sum over the layers of beta / 2 * mean over N of ||Q(A_student) - Q(A_teacher)||_2,
            beta = loss_weight / (H * W)

The paper uses the norm, its code the mean of the squares. The paper's beta is 1000 divided by the number of positions
in a map and by the batch size. Here the mean over N already divides by the batch size, so beta is `loss_weight` divided
only by the number of positions. p = 1 is the sum of absolute values; the code uses p = 2. Maps of different sizes are
pooled to the smaller one, as in later implementations (RepDistiller); the paper has no such maps. The authors reset the
momentum at every drop of the learning rate; here it is kept.

It works with any task and any outputs of the network, because only outputs of layers are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tersor.core.plain_values import plain_dataclass
from tersor.data.batch import Batch
from tersor.graph.feature_extraction import pooled
from tersor.training.attachment import Attachment, without_loss
from tersor.training.context import AttachContext
from tersor.training.layer_pairs import LayerPair, match_layers
from tersor.training.method import PLAIN_VALUES
from tersor.training.objective import LossTerm, Outputs

Mode = Literal["code", "paper"]


def attention_map(values: Tensor, p: int) -> Tensor:
    """Feature maps (N, C, H, W) -> attention maps (N, H * W) of norm 1."""
    powers = values.abs() if p == 1 else values.pow(p)  # an even power needs no absolute value
    return F.normalize(powers.mean(1).flatten(1), dim=1)


def attention_loss(student: Tensor, teacher: Tensor, p: int, mode: Mode = "code") -> Tensor:
    """Distance between the attention maps of two feature maps (N, C, H, W); the numbers of channels may differ."""
    difference = attention_map(student, p) - attention_map(teacher, p)
    if mode == "code":
        return difference.square().mean()
    return torch.linalg.vector_norm(difference, dim=1).mean() / (2 * difference.shape[1])


class AttentionTerm(LossTerm):
    """The weighted sum over layer pairs."""

    name = "attention_transfer"

    def __init__(self, pairs: Sequence[LayerPair], p: int, mode: Mode, loss_weight: float) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.p = p
        self.mode: Mode = mode
        self.loss_weight = loss_weight

    def forward(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The loss of one batch."""
        assert teacher is not None
        losses = [
            attention_loss(
                pooled(student.layers[pair.student], pair.common_size),
                pooled(teacher.layers[pair.teacher], pair.common_size),
                self.p,
                self.mode,
            )
            for pair in self.pairs
        ]
        return self.loss_weight * torch.stack(losses).sum()


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class AttentionTransfer:
    """Matches the teacher's spatial attention maps at several layers (attention transfer)."""

    needs_teacher: ClassVar[bool] = True
    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"p": 1, "mode": "paper", "loss_weight": 500.0}
    off: ClassVar[dict[str, Any]] = {"loss_weight": 0.0}

    layers: Annotated[
        tuple[str, ...], Field(description="patterns of student layers; default: the last layer at each resolution")
    ] = ()
    teacher_layers: Annotated[
        tuple[str, ...], Field(description="patterns of teacher layers; default: the same as `layers`")
    ] = ()
    p: Annotated[Literal[1, 2, 4], Field(description="power of the absolute activations")] = 2
    mode: Annotated[Mode, Field(description="mean of squares (code) or norm (paper)")] = "code"
    loss_weight: Annotated[float, Field(ge=0, description="weight of the loss (beta in the code); 0 turns it off")] = (
        1000.0
    )
    label_weight: Annotated[float, Field(ge=0, description="weight of the task's loss on the labels")] = 1.0

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Add the loss; changes nothing in `model`.

        Raises:
            InputError: no teacher, no images, or layers that do not exist or cannot be paired.
        """
        pairs = match_layers(
            model, context.teacher, self.layers, self.teacher_layers, context.data, method="attention_transfer"
        )
        if not self.loss_weight:
            return without_loss(model, self.label_weight)
        term = AttentionTerm(pairs, self.p, self.mode, self.loss_weight)
        return Attachment(model, [term], self.label_weight, layers=[pair.paths for pair in pairs])
