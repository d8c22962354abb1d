"""Contrastive distillation: the student's picture of an image is nearer to the teacher's than that of other images.

Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020.

    s, t (N, d)   pooled features of student and teacher, through a linear layer each, brought to length 1
    M             a memory of both for every training image, a running mean that is brought to length 1 again
    h(a, b)       exp(a . b / tau) / Z, Z from the first batch;  m = negatives / images
    L = loss_weight * mean over N of [ -log h(s, M_t[i]) / (h(s, M_t[i]) + m)  -  sum over K others j of
        log m / (h(s, M_t[j]) + m) ], and the same with s and t changed

As in the authors' code: K = 16,384, d = 128, tau = 0.07, weight 0.8, memory's momentum 0.5. Their data loader takes the
others from other classes; here they are drawn from all images, as their memory does where it is told none. The layer
before the classifier is the named feature map, pooled.
"""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tersor.core import distributed
from tersor.core.errors import InputError
from tersor.core.seeded import seeded
from tersor.data.batch import Batch
from tersor.graph.feature_extraction import as_map
from tersor.training.attachment import Attachment, without_loss
from tersor.training.context import AttachContext
from tersor.training.layer_pairs import LayerPair, match_layer
from tersor.training.method import PLAIN_VALUES
from tersor.training.objective import LossTerm, Outputs


def contrastive_loss(right: Tensor, others: Tensor, images: int) -> Tensor:
    """Of log h of the right image (N,) and of K others (N, K) that were drawn from so many `images`.

    -log h / (h + m) and -log m / (h + m) are softplus(-z) and softplus(z) of z = log h - log m.
    """
    log_m = math.log(others.shape[1] / images)
    return (F.softplus(log_m - right) + F.softplus(others - log_m).sum(1)).mean()


class ContrastTerm(LossTerm):
    """The weighted loss; linear layers, memories and normalisation lie in it."""

    name = "crd"
    of_student: Tensor
    of_teacher: Tensor
    log_z: Tensor

    def __init__(self, method: CRD, pair: LayerPair, images: int) -> None:
        super().__init__()
        self.method = method
        self.pair = pair
        width = method.width
        self.student_embedding = nn.Linear(pair.student_channels, width)
        self.teacher_embedding = nn.Linear(pair.teacher_channels, width)
        edge = 1 / math.sqrt(width / 3)
        self.register_buffer("of_student", torch.empty(images, width).uniform_(-edge, edge))
        self.register_buffer("of_teacher", torch.empty(images, width).uniform_(-edge, edge))
        self.register_buffer("log_z", torch.full((2,), torch.nan))  # of either side, from the first batch on

    def forward(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The loss of one batch; in training, the memories take it in."""
        assert teacher is not None
        if batch.index is None:
            raise InputError("crd remembers every image, and the batches do not say which they hold. Give Batch.index.")
        ours = self._embedded(student.layers[self.pair.student], self.student_embedding)
        theirs = self._embedded(teacher.layers[self.pair.teacher], self.teacher_embedding)
        images = len(self.of_student)
        drawn = torch.randint(images, (len(ours), self.method.negatives), device=ours.device)
        autocast = student.context.autocasting(batch)
        losses = [
            contrastive_loss(*self._compared(anchors, memory, batch.index, drawn, side, autocast), images)
            for side, (anchors, memory) in enumerate(((ours, self.of_teacher), (theirs, self.of_student)))
        ]
        if self.training:
            self._remember(self.of_student, batch.index, ours)
            self._remember(self.of_teacher, batch.index, theirs)
        return self.method.loss_weight * torch.stack(losses).sum()

    def _embedded(self, values: Tensor, embedding: nn.Module) -> Tensor:
        return F.normalize(embedding(as_map(values).mean((2, 3))), dim=1)

    def _compared(
        self,
        anchors: Tensor,
        memory: Tensor,
        index: Tensor,
        drawn: Tensor,
        side: int,
        autocast: torch.autocast,
    ) -> tuple[Tensor, Tensor]:
        """log h of anchors (N, d) and what the memory (images, d) holds of the same images (N,), and at `drawn` (N, K).

        One product with the whole memory, in the networks' precision, where N * K vectors of it, collected, would be
        more than it holds.
        """
        scaled = anchors / self.method.tau
        right = (scaled * memory[index]).sum(1)
        if drawn.numel() < len(memory):
            others = torch.einsum("nd,nkd->nk", scaled, memory[drawn])
        else:
            with autocast:
                others = (scaled @ memory.clone().T).gather(1, drawn).float()
        if self.log_z[side].isnan():
            seen = torch.cat([right[:, None], others], 1).detach()
            self.log_z[side] = seen.logsumexp((0, 1)) + math.log(len(memory) / seen.numel())
        log_z = self.log_z[side].clone()
        return right - log_z, others - log_z

    @torch.no_grad()
    def _remember(self, memory: Tensor, index: Tensor, values: Tensor) -> None:
        index, values = (torch.cat(distributed.all_gather(tensor.detach())) for tensor in (index, values))
        momentum = self.method.momentum
        memory[index] = F.normalize(momentum * memory[index] + (1 - momentum) * values, dim=1)


@dataclass(frozen=True, config=PLAIN_VALUES)
class CRD:
    """A teacher's picture of every image, among those of others."""

    needs_teacher: ClassVar[bool] = True
    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"negatives": 64, "width": 32, "tau": 0.1}
    off: ClassVar[dict[str, Any]] = {"loss_weight": 0.0}

    layer: Annotated[str, Field(description="of the student; the last feature map if left")] = ""
    teacher_layer: Annotated[str, Field(description="of the teacher; as `layer` if left")] = ""
    loss_weight: Annotated[float, Field(ge=0, description="0 leaves the labels as they are")] = 0.8
    label_weight: Annotated[float, Field(ge=0, description="factor on the labels' cross entropy")] = 1.0
    negatives: Annotated[int, Field(ge=1, description="K: images that each is compared with")] = 16384
    width: Annotated[int, Field(ge=1, description="d: of what is compared")] = 128
    tau: Annotated[float, Field(gt=0, description="temperature of the similarity")] = 0.07
    momentum: Annotated[float, Field(ge=0, lt=1, description="of the memories")] = 0.5
    seed: Annotated[int, Field(ge=0, lt=2**32, description="of the weights, and of what is remembered at first")] = 0

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Builds linear layers and memories; changes nothing in `model`.

        Raises:
            InputError: no teacher, no data that knows how many images it holds, a layer that is not there.
        """
        pair = match_layer(model, context.teacher, self.layer, self.teacher_layer, context.data, method="crd")
        if not self.loss_weight:
            return without_loss(model, self.label_weight)
        held = getattr(context.data, "images", getattr(context.data, "dataset", None))
        if not isinstance(held, Sized):
            raise InputError("crd remembers every training image. Pass tersor.data.Batches, or a DataLoader.")
        with seeded(self.seed):
            term = ContrastTerm(self, pair, len(held))
        return Attachment(model, [term], self.label_weight, layers=[pair.paths])
