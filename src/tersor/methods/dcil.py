"""DCIL: each step runs the network with masked and with dense weights; only the dense run trains masked weights.

Kim, Yoo, Song, Yoo and Kwak, "Dynamic Collective Intelligence Learning: Finding Efficient Sparse Model via Refined
Gradients for Pruned Weights", 2021 (arXiv 2109.04660).

    g    = m * dL/dw_hat(m * w) + (1 - m) * dL/dw(w)     w (C_out, ...), m in {0, 1} of its shape: the refined gradient
    L    = CE(z) + CE(z') [+ KL(z' || z) + KL(z || z') after a warm-up]
    KL   = T^2 * KL of softmax(./T), T = 2; the first argument is detached

z (N, classes, ...) are the logits with masked weights (the masked path), z' those with all weights (the dense path). KL
is averaged over images and positions. CE stands for the task's loss. The masks are updated as in `dpf`. The paper
describes only the refined gradient. The authors' code has two more parts, which can be switched off here: a separate
BatchNorm and head for the dense path (`own_norms`), and mutual distillation of both paths (`mutual`, for tasks with
logits) after 70 of 300 epochs. Without `refined_gradient` both paths update all weights.

A step runs the network twice, at twice the cost. The dense path's own modules start as copies of the network's and are
discarded at the end of the stage. The dense path is not quantized where `qat` quantizes the network. The dense path has
a label loss of weight 1 and no teacher.

In the code the sparsity rises per epoch; here it rises per step. The code adds 1e-7 to the probabilities to avoid
log(0); here log-softmax is used, which makes this unnecessary. The paper reports the checkpoint with the best test
accuracy, sometimes one from before the final sparsity was reached; here the stage ends exactly at the final sparsity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.core.errors import InputError
from tersor.core.plain_values import plain_dataclass
from tersor.data.batch import Batch
from tersor.graph.layer_selection import Layer, prunable
from tersor.pruning.dense_path import DensePathModules
from tersor.tasks import name_of
from tersor.tasks.network_outputs import in_float32
from tersor.tasks.task import loss_of
from tersor.training.attachment import Attachment
from tersor.training.class_logits import distributions, require_logits
from tersor.training.context import AttachContext, require_steps
from tersor.training.dynamic_masks import DynamicMasks
from tersor.training.mask_attachment import MaskedLayers, check_floor, insert_masks
from tersor.training.method import PLAIN_VALUES
from tersor.training.objective import LossTerm, Outputs

_TEMPERATURE = 2.0


def mutual_loss(first: Tensor, second: Tensor) -> Tensor:
    """T^2 * KL of logits (rows, classes) in both directions; the target of each is detached."""
    one, other = (F.log_softmax(logits / _TEMPERATURE, dim=1) for logits in (first, second))
    both = [
        F.kl_div(logits, target.detach(), log_target=True, reduction="batchmean")
        for logits, target in ((one, other), (other, one))
    ]
    return _TEMPERATURE**2 * (both[0] + both[1])


class DensePath(LossTerm):
    """The dense path's loss on the labels, and the mutual loss of both paths.

    Args:
        own: the modules that the dense path does not share with the masked one.
        compared: whether there is a mutual loss.
    """

    name = "dcil"
    mutual: Tensor

    def __init__(self, own: DensePathModules, *, compared: bool = True) -> None:
        super().__init__()
        self.compared = compared
        self.own = own
        self.register_buffer("mutual", torch.zeros(()))

    def forward(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The loss of one batch."""
        context = student.context
        targets = context.targets(batch, teacher)
        if targets is None:
            raise InputError("dcil trains its dense path on the labels, and the images have none. Pass labeled images.")
        model, task = context.model, context.task
        assert model is not None
        with context.autocasting(batch):
            outputs = self.own.dense_outputs(model, *task.inputs(batch, training=model.training))
        outputs = in_float32(outputs)
        labels = loss_of(task, outputs, targets)
        if not self.compared:
            return labels
        ours, dense = (distributions(each.logits, task) for each in (student, Outputs(outputs, context=context)))
        return labels + self.mutual * mutual_loss(ours, dense)


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class DCIL:
    """Run the network with masked and with dense weights in each step; only the dense run trains masked weights."""

    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"sparsity": 0.6, "every": 2, "end": 0.5, "floor": 0.1, "warmup": 0.4}
    off: ClassVar[dict[str, Any]] = {"sparsity": 0.0}

    sparsity: Annotated[float, Field(ge=0, lt=1, description="final fraction of masked weights")] = 0.9
    refined_gradient: Annotated[
        bool, Field(description="train masked weights on the dense path only, and the others on the masked path only")
    ] = True
    own_norms: Annotated[bool, Field(description="separate BatchNorm and head for the dense path")] = True
    mutual: Annotated[bool, Field(description="mutual distillation of both paths")] = True
    warmup: Annotated[float, Field(ge=0, lt=1, description="fraction of the stage after which `mutual` starts")] = 0.23
    every: Annotated[int, Field(ge=1, description="steps between two mask updates")] = 16
    end: Annotated[float, Field(gt=0, le=1, description="fraction of the stage over which the sparsity rises")] = 0.75
    floor: Annotated[
        float, Field(ge=0, lt=1, description="fraction of each layer that always remains; at least one weight")
    ] = 0.0
    layers: MaskedLayers = ()

    @property
    def needs_logits(self) -> bool:
        """Whether both paths are compared by their logits."""
        return self.mutual

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Insert masks, and copy the dense path's own modules.

        Raises:
            InputError: `mutual` for a task without logits, no steps, a pattern that matches nothing, a quantized
                weight, a floor that contradicts the sparsity.
        """
        layers = prunable(model, self.layers)
        if not self.sparsity:
            return Attachment(model)
        if self.mutual:
            require_logits(context, "dcil", "mutual: false", network=model)
        if context.task.from_original and context.teacher is None:
            raise InputError(
                f"dcil trains its dense path on targets, which in the task {name_of(context.task)} are the outputs of "
                "the original network. Write teacher: original in the recipe, or AttachContext(teacher=...) in your "
                "own loop."
            )
        require_steps(context, "dcil")
        check_floor(self.floor, self.sparsity)
        insert_masks(layers, "split" if self.refined_gradient else "straight_through", "dcil")
        own = DensePathModules(model, masked=layers if self.own_norms else None)
        return DCILAttachment(self, model, layers, DensePath(own, compared=self.mutual), context.steps)


class DCILAttachment(DynamicMasks):
    """Dynamic masks, and a mutual loss that starts after the warm-up."""

    def __init__(
        self, method: DCIL, model: nn.Module, layers: Mapping[str, Layer], path: DensePath, steps: int
    ) -> None:
        super().__init__(model, layers, method, steps, terms=[path])
        self.path = path
        self.mutual_from = round(method.warmup * steps) if method.mutual else None
        self._set_mutual(0)

    def _set_mutual(self, step: int) -> None:
        self.path.mutual.fill_(float(self.mutual_from is not None and step >= self.mutual_from))

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Update the masks when due, and the weight of the mutual loss."""
        super().after_step(step, optimizer)
        self._set_mutual(step + 1)
