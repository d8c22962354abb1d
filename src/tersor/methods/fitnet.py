"""FitNets: the student's features, by way of a regressor, become the teacher's.

Romero, Ballas, Kahou, Chassang, Gatta and Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015.

    L = loss_weight * sum over the layers of mean (r(A_student) - A_teacher)^2
    A: (N, C, H, W);  r: a convolution to the teacher's channels, learned with the student, then thrown away

The paper trains the student up to the layer on this loss alone, then the whole on soft targets: two stages, the first
with `label_weight: 0`. Later implementations (RepDistiller, mdistiller) train on both losses at once, with the mean
over all elements, a weight of 100, a middle layer, and BatchNorm and ReLU behind their regressor. The mean here is
theirs; without BatchNorm in the regressor their weight keeps a ResNet-20 from learning anything, so that 10 is the
default. The paper's regressor has no padding; here it is 1x1, and the larger map is pooled. A network that learns from
the one that it was cut from has the same channels along its residual stream, and needs none: `regressor: false`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.core.seeded import seeded
from tersor.data.batch import Batch
from tersor.graph.feature_extraction import pooled
from tersor.training.attachment import Attachment, without_loss
from tersor.training.context import AttachContext
from tersor.training.layer_pairs import LayerPair, last_path, match_layers
from tersor.training.method import PLAIN_VALUES
from tersor.training.objective import LossTerm, Outputs


class HintTerm(LossTerm):
    """The weighted squared distance, after a regressor for each pair of layers."""

    name = "fitnet"

    def __init__(self, pairs: Sequence[LayerPair], loss_weight: float, regressor: bool) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.loss_weight = loss_weight
        self.regressors = nn.ModuleList(
            nn.Conv2d(pair.student_channels, pair.teacher_channels, 1) if regressor else nn.Identity() for pair in pairs
        )

    def forward(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The loss of one batch; the images' labels are not looked at."""
        assert teacher is not None
        losses: list[Tensor] = []
        for pair, regressor in zip(self.pairs, self.regressors, strict=True):
            ours = pooled(student.layers[pair.student], pair.common_size)
            theirs = pooled(teacher.layers[pair.teacher], pair.common_size)
            losses.append(F.mse_loss(regressor(ours), theirs))
        return self.loss_weight * torch.stack(losses).sum()


@dataclass(frozen=True, config=PLAIN_VALUES)
class FitNet:
    """The features of a teacher, as they are."""

    needs_teacher: ClassVar[bool] = True
    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"loss_weight": 10.0, "label_weight": 0.5}
    off: ClassVar[dict[str, Any]] = {"loss_weight": 0.0}

    layers: Annotated[tuple[str, ...], Field(description="patterns; the last feature map if left")] = ()
    teacher_layers: Annotated[tuple[str, ...], Field(description="patterns; as `layers` if left")] = ()
    loss_weight: Annotated[float, Field(ge=0, description="0 leaves the labels as they are")] = 10.0
    label_weight: Annotated[float, Field(ge=0, description="factor on the labels' cross entropy")] = 1.0
    regressor: Annotated[bool, Field(description="false: as they are, where both have the same channels")] = True
    seed: Annotated[int, Field(ge=0, lt=2**32, description="of the regressors' weights")] = 0

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Builds the regressors; changes nothing in `model`.

        Raises:
            InputError: no teacher, no images to see shapes on, layers that are not there or do not pair; channels that
                differ, without a regressor.
        """
        pairs = match_layers(
            model, context.teacher, self.layers, self.teacher_layers, context.data, method="fitnet", select=last_path
        )
        if not self.loss_weight:
            return without_loss(model, self.label_weight)
        for pair in pairs:
            if not self.regressor and pair.student_channels != pair.teacher_channels:
                raise InputError(
                    f"fitnet compares {pair.student} of {pair.student_channels} channels with {pair.teacher} of "
                    f"{pair.teacher_channels}, and regressor is false. Write regressor: true, or other layers."
                )
        with seeded(self.seed):
            term = HintTerm(pairs, self.loss_weight, self.regressor)
        return Attachment(model, [term], self.label_weight, layers=[pair.paths for pair in pairs])
