"""DCIL: two paths through one set of weights, and each weight learns on the path on which it counts.

Kim, Yoo, Song, Yoo and Kwak, "Dynamic Collective Intelligence Learning: Finding Efficient Sparse Model via Refined
Gradients for Pruned Weights", 2021 (arXiv 2109.04660).

    g    = m * dL/dw_hat(m * w) + (1 - m) * dL/dw(w)     w (C_out, ...), m in {0, 1} of its shape: the refined gradient
    L    = CE(z) + CE(z') [+ KL(z' || z) + KL(z || z') after a warm-up]
    KL   = T^2 * KL of softmax(./T), T = 2, towards the one that is named first, which has no gradient

z (N, classes) are the logits of the masked network, z' those of the dense one. The masks move as those of `dpf`: so a
masked weight comes back with what it has learned where it was seen. The lecture shows the refined gradient alone. The
authors' code has two more things, each of which can be switched off here: BatchNorm and head of its own for the dense
path (`own_norms`), and both paths teach each other (`mutual`) after 70 of 300 epochs. Without `refined_gradient` both
paths move all weights, as the code's other settings do.

One step runs the network twice, and costs twice as much. The dense path's own parts are copies of the network's when
the stage begins; they learn, and are thrown away at its end. The dense path sees no grid where `qat` lays some. Its
labels' loss has the weight 1, and no teacher looks at it.

The code's sparsity rises by the epoch, here by the step. It adds 1e-7 to the probabilities it learns from, which the
logarithms here do not need. The paper's checkpoints are the best ones by the test set, and partly from before the
sparsity is reached; here the stage ends exactly at it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.core.errors import InputError
from tersor.data.batch import Batch
from tersor.graph.layer_selection import Layer, prunable
from tersor.pruning.dense_path import OwnParts
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.mask_attachment import DynamicMasks, check_floor, check_steps, lay_masks
from tersor.training.method import PLAIN_VALUES
from tersor.training.objective import LossTerm, Outputs

_TEMPERATURE = 2.0


def mutual_loss(first: Tensor, second: Tensor) -> Tensor:
    """T^2 * KL of logits (N, classes) in both directions; each learns from the other, which is not moved by it."""
    one, other = (F.log_softmax(logits / _TEMPERATURE, dim=1) for logits in (first, second))
    both = [
        F.kl_div(learns, teaches.detach(), log_target=True, reduction="batchmean")
        for learns, teaches in ((one, other), (other, one))
    ]
    return _TEMPERATURE**2 * (both[0] + both[1])


class DensePath(LossTerm):
    """The loss of the dense path, and the mutual loss of both paths.

    Args:
        own: the modules that the dense path does not share with the masked one.
    """

    name = "dcil"
    mutual: Tensor

    def __init__(self, own: OwnParts) -> None:
        super().__init__()
        self.own = own
        self.register_buffer("mutual", torch.zeros(()))

    def forward(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The loss of one batch."""
        if batch.labels is None:
            raise InputError("dcil trains its dense path on the labels, and the images have none. Give labels.")
        context = student.context
        assert context.model is not None
        with context.autocasting(batch):
            logits = self.own.dense(context.model, batch.images).float()
        labels = F.cross_entropy(logits, batch.labels, label_smoothing=context.label_smoothing)
        return labels + self.mutual * mutual_loss(student.logits, logits)


@dataclass(frozen=True, config=PLAIN_VALUES)
class DCIL:
    """Moving masks whose masked weights learn on a dense path beside the masked one."""

    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"sparsity": 0.6, "every": 2, "end": 0.5, "floor": 0.1, "warmup": 0.4}
    off: ClassVar[dict[str, Any]] = {"sparsity": 0.0}

    sparsity: Annotated[float, Field(ge=0, lt=1, description="fraction of the weights that is masked at the end")] = 0.9
    refined_gradient: Annotated[
        bool, Field(description="masked weights learn on the dense path alone, the others on the masked one alone")
    ] = True
    own_norms: Annotated[bool, Field(description="BatchNorm and head of its own for the dense path")] = True
    mutual: Annotated[bool, Field(description="both paths learn from each other's answers")] = True
    warmup: Annotated[float, Field(ge=0, lt=1, description="fraction of the stage before `mutual`")] = 0.23
    every: Annotated[int, Field(ge=1, description="steps between two masks")] = 16
    end: Annotated[float, Field(gt=0, le=1, description="fraction of the stage after which the sparsity is fixed")] = (
        0.75
    )
    floor: Annotated[float, Field(ge=0, lt=1, description="fraction of each layer that stays; 0 is one weight")] = 0.0
    layers: Annotated[
        tuple[str, ...],
        Field(description="patterns; all convolutions if left, or all fully connected layers where there are none"),
    ] = ()

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Lays a mask on every chosen weight, and copies what the dense path has for itself.

        Raises:
            InputError: no steps, a pattern that matches nothing, a weight on a grid already, a floor that leaves too
                little to mask.
        """
        layers = prunable(model, self.layers)
        if not self.sparsity:
            return Attachment(model)
        check_steps(context.steps, "dcil")
        check_floor(self.floor, self.sparsity)
        lay_masks(layers, "split" if self.refined_gradient else "all", "dcil")
        own = OwnParts(model, masked=layers if self.own_norms else None)
        return DCILAttachment(self, model, layers, DensePath(own), context.steps)


class DCILAttachment(DynamicMasks):
    """Masks that move, and two paths that teach each other after a while."""

    def __init__(
        self, method: DCIL, model: nn.Module, layers: Mapping[str, Layer], path: DensePath, steps: int
    ) -> None:
        super().__init__(
            model,
            layers,
            sparsity=method.sparsity,
            every=method.every,
            end=method.end,
            floor=method.floor,
            steps=steps,
            terms=[path],
        )
        self.path = path
        self.mutual_from = round(method.warmup * steps) if method.mutual else None
        self._set(0)

    def _set(self, step: int) -> None:
        self.path.mutual.fill_(float(self.mutual_from is not None and step >= self.mutual_from))

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Masks anew where it is time, and what the next step asks."""
        super().after_step(step, optimizer)
        self._set(step + 1)
