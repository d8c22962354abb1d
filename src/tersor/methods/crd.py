"""Contrastive distillation: aligns student and teacher embeddings of one image, and separates those of other images.

Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020.

    s, t (N, d)   embeddings: pooled features of student and teacher, each through a linear layer, of norm 1
    M             a memory of both embeddings of every training image, a running mean of norm 1
    h(a, b)       exp(a . b / tau) / Z, Z from the first batch;  m = negatives / images
    L = loss_weight * mean over N of [ -log h(s, M_t[i]) / (h(s, M_t[i]) + m)  -  sum over K negatives j of
        log m / (h(s, M_t[j]) + m) ], and the same with s and t exchanged

As in the authors' code: K = 16,384, d = 128, tau = 0.07, weight 0.8, memory momentum 0.5. Their data loader draws the
negatives from other classes; here they are drawn from all images, which is the default of the memory module in their
code. The features are the pooled feature map of the named layer.

It works with any task and any outputs of the network, because no label is used. Each image has one embedding, computed
from its features averaged over the pixels. For segmentation and detection, `fitnet` and `attention_transfer` compare
the features position by position.
"""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tersor.core import distributed
from tersor.core.device import seeded
from tersor.core.errors import InputError
from tersor.core.plain_values import plain_dataclass
from tersor.data.batch import Batch
from tersor.graph.feature_extraction import as_map
from tersor.training.attachment import Attachment, without_loss
from tersor.training.context import AttachContext
from tersor.training.layer_pairs import LayerPair, match_layer
from tersor.training.method import PLAIN_VALUES
from tersor.training.objective import LossTerm, Outputs


def contrastive_loss(positive: Tensor, negatives: Tensor, images: int) -> Tensor:
    """The loss from log h of the same image (N,) and of K negatives (N, K), drawn from `images` images.

    -log h / (h + m) and -log m / (h + m) are softplus(-z) and softplus(z) of z = log h - log m.
    """
    log_m = math.log(negatives.shape[1] / images)
    return (F.softplus(log_m - positive) + F.softplus(negatives - log_m).sum(1)).mean()


class ContrastTerm(LossTerm):
    """The weighted loss, with its linear layers, memories and normalization constants."""

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
        self.register_buffer("log_z", torch.full((2,), torch.nan))  # of student and teacher, set by the first batch

    def forward(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The loss of one batch; in training mode, updates the memories."""
        assert teacher is not None
        if batch.index is None:
            raise InputError(
                "crd stores an embedding of every image, but the batches have no image indices. Set Batch.index to the "
                "indices of the images in the data set."
            )
        ours = self._embed(student.layers[self.pair.student], self.student_embedding)
        theirs = self._embed(teacher.layers[self.pair.teacher], self.teacher_embedding)
        images = len(self.of_student)
        drawn = torch.randint(images, (len(ours), self.method.negatives), device=ours.device)
        autocast = student.context.autocasting(batch)
        losses = [
            contrastive_loss(*self._log_h(anchors, memory, batch.index, drawn, side, autocast), images)
            for side, (anchors, memory) in enumerate(((ours, self.of_teacher), (theirs, self.of_student)))
        ]
        if self.training:
            self._update(self.of_student, batch.index, ours)
            self._update(self.of_teacher, batch.index, theirs)
        return self.method.loss_weight * torch.stack(losses).sum()

    def _embed(self, values: Tensor, embedding: nn.Module) -> Tensor:
        return F.normalize(embedding(as_map(values).mean((2, 3))), dim=1)

    def _log_h(
        self,
        anchors: Tensor,
        memory: Tensor,
        index: Tensor,
        drawn: Tensor,
        side: int,
        autocast: torch.autocast,
    ) -> tuple[Tensor, Tensor]:
        """log h of anchors (N, d) with the memory (images, d) at the same images (N,), and at `drawn` (N, K).

        Where N * K exceeds the number of images, one product with the whole memory, in the networks' precision, is
        cheaper than gathering N * K vectors.
        """
        scaled = anchors / self.method.tau
        positive = (scaled * memory[index]).sum(1)
        if drawn.numel() < len(memory):
            negatives = torch.einsum("nd,nkd->nk", scaled, memory[drawn])
        else:
            with autocast:
                negatives = (scaled @ memory.clone().T).gather(1, drawn).float()
        if self.log_z[side].isnan():
            logits = torch.cat([positive[:, None], negatives], 1).detach()
            self.log_z[side] = logits.logsumexp((0, 1)) + math.log(len(memory) / logits.numel())
        log_z = self.log_z[side].clone()
        return positive - log_z, negatives - log_z

    @torch.no_grad()
    def _update(self, memory: Tensor, index: Tensor, values: Tensor) -> None:
        index, values = (torch.cat(distributed.all_gather(tensor.detach())) for tensor in (index, values))
        momentum = self.method.momentum
        memory[index] = F.normalize(momentum * memory[index] + (1 - momentum) * values, dim=1)


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class CRD:
    """Contrasts student and teacher embeddings of the same image with those of other images (CRD)."""

    needs_teacher: ClassVar[bool] = True
    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"negatives": 64, "width": 32, "tau": 0.1}
    off: ClassVar[dict[str, Any]] = {"loss_weight": 0.0}

    layer: Annotated[str, Field(description="student layer; by default the last feature map")] = ""
    teacher_layer: Annotated[str, Field(description="teacher layer; by default the same as `layer`")] = ""
    loss_weight: Annotated[float, Field(ge=0, description="weight of the loss; 0 turns it off")] = 0.8
    label_weight: Annotated[float, Field(ge=0, description="weight of the task's loss on the labels")] = 1.0
    negatives: Annotated[int, Field(ge=1, description="K: negatives per image")] = 16384
    width: Annotated[int, Field(ge=1, description="d: size of the embeddings")] = 128
    tau: Annotated[float, Field(gt=0, description="temperature of the similarity")] = 0.07
    momentum: Annotated[float, Field(ge=0, lt=1, description="momentum of the memory updates")] = 0.5
    seed: Annotated[int, Field(ge=0, lt=2**32, description="seed of the linear layers and the initial memories")] = 0

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Build linear layers and memories; changes nothing in `model`.

        Raises:
            InputError: no teacher, data of unknown length, or a layer that does not exist.
        """
        pair = match_layer(model, context.teacher, self.layer, self.teacher_layer, context.data, method="crd")
        if not self.loss_weight:
            return without_loss(model, self.label_weight)
        images = getattr(context.data, "images", getattr(context.data, "dataset", None))
        if not isinstance(images, Sized):
            raise InputError(
                "crd stores an embedding of every image, but the number of images is unknown. Pass "
                "tersor.data.Batches, or a DataLoader whose data set has a length."
            )
        with seeded(self.seed):
            term = ContrastTerm(self, pair, len(images))
        return Attachment(model, [term], self.label_weight, layers=[pair.paths])
