"""FitNets: a regressor predicts the teacher's features (hints) from the student's features.

Romero, Ballas, Kahou, Chassang, Gatta and Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015.

    L = loss_weight * sum over the layers of mean (r(A_student) - A_teacher)^2
    A: (N, C, H, W);  r: a convolution to the teacher's channels, trained with the student, then discarded

The paper first trains the student up to the layer with this loss only, then the whole network with soft targets: two
stages, the first with `label_weight: 0`. Later implementations (RepDistiller, mdistiller) use both losses at once, with
the mean over all elements, weight 100, a middle layer, and a regressor with BatchNorm and ReLU. The mean here is the
same as theirs; without BatchNorm in the regressor, a ResNet-20 does not learn with a weight of 100, so the default is
10. The paper's regressor has no padding; here it is 1x1, and the larger map is pooled. A student that was pruned from
its teacher without removing channels of the residual stream (`exclude` of `channel_pruning`) needs no regressor:
`regressor: false`.

It works with any task and any outputs of the network, because only outputs of layers are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tersor.core.device import seeded
from tersor.core.errors import InputError
from tersor.core.plain_values import plain_dataclass
from tersor.data.batch import Batch
from tersor.graph.feature_extraction import pooled
from tersor.training.attachment import Attachment, without_loss
from tersor.training.context import AttachContext
from tersor.training.layer_pairs import LayerPair, last_path, match_layers
from tersor.training.method import PLAIN_VALUES
from tersor.training.objective import LossTerm, Outputs


class HintTerm(LossTerm):
    """The weighted squared distance, with a regressor for each layer pair."""

    name = "fitnet"

    def __init__(self, pairs: Sequence[LayerPair], loss_weight: float, regressor: bool) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.loss_weight = loss_weight
        self.regressors = nn.ModuleList(
            nn.Conv2d(pair.student_channels, pair.teacher_channels, 1) if regressor else nn.Identity() for pair in pairs
        )

    def forward(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The loss of one batch; labels are not used."""
        assert teacher is not None
        losses: list[Tensor] = []
        for pair, regressor in zip(self.pairs, self.regressors, strict=True):
            ours = pooled(student.layers[pair.student], pair.common_size)
            theirs = pooled(teacher.layers[pair.teacher], pair.common_size)
            losses.append(F.mse_loss(regressor(ours), theirs))
        return self.loss_weight * torch.stack(losses).sum()


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class FitNet:
    """Regresses the teacher's intermediate features from the student's (FitNets hints)."""

    needs_teacher: ClassVar[bool] = True
    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"loss_weight": 10.0, "label_weight": 0.5}
    off: ClassVar[dict[str, Any]] = {"loss_weight": 0.0}

    layers: Annotated[
        tuple[str, ...], Field(description="patterns of student layers; default: the last feature map")
    ] = ()
    teacher_layers: Annotated[
        tuple[str, ...], Field(description="patterns of teacher layers; default: the same as `layers`")
    ] = ()
    loss_weight: Annotated[float, Field(ge=0, description="weight of the loss; 0 turns it off")] = 10.0
    label_weight: Annotated[float, Field(ge=0, description="weight of the task's loss on the labels")] = 1.0
    regressor: Annotated[bool, Field(description="1x1 convolution to the teacher's channels")] = True
    seed: Annotated[int, Field(ge=0, lt=2**32, description="seed of the regressors' weights")] = 0

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Build the regressors; changes nothing in `model`.

        Raises:
            InputError: no teacher, no images, layers that do not exist or cannot be paired, or different numbers of
                channels without a regressor.
        """
        pairs = match_layers(
            model, context.teacher, self.layers, self.teacher_layers, context.data, method="fitnet", select=last_path
        )
        if not self.loss_weight:
            return without_loss(model, self.label_weight)
        for pair in pairs:
            if not self.regressor and pair.student_channels != pair.teacher_channels:
                raise InputError(
                    f"fitnet cannot compare {pair.student} ({pair.student_channels} channels) with {pair.teacher} "
                    f"({pair.teacher_channels} channels), since regressor is false. Write regressor: true, or other "
                    "layers."
                )
        with seeded(self.seed):
            term = HintTerm(pairs, self.loss_weight, self.regressor)
        return Attachment(model, [term], self.label_weight, layers=[pair.paths for pair in pairs])
