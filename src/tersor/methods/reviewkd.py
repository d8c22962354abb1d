"""Review: the student's late layers are fused into its early ones, and each is compared with the teacher's.

Chen, Liu, Zhao and Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021.

    from the last layer to the first, of features A_i (N, C_i, H_i, W_i):
        x_i = 1x1 convolution of A_i to m channels;  where there is a later one, its x is laid over it:
        x_i = a_i * x_i + b_i * up(x_(i+1)),   (a_i, b_i) = sigmoid of a 1x1 convolution of both
        R_i = 3x3 convolution of x_i to the teacher's channels
    L = warm-up * loss_weight * sum over i of HCL(R_i, T_i)
    HCL(r, t): mean squared distance of r and t, and of both pooled to 4, 2 and 1 pixels a side, by weights 1, 1/2, ...

The authors' code adds the pooled features before the classifier as one more layer, and compares features before the
last ReLU of a stage; here they are the outputs of the layers that are named, and the pooled last one. m is the channels
of the student's last layer, at most 512, as in the code, which also lets the weight rise over 20 of 240 epochs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tersor.core.attachment import Attachment
from tersor.core.layers import as_map
from tersor.core.method import PLAIN_VALUES
from tersor.core.objective import Batch, Outputs
from tersor.core.pairs import Pair, pairs_of
from tersor.core.rising import RisingAttachment, RisingTerm
from tersor.core.seeded import seeded
from tersor.core.target import Target

_MOST_CHANNELS = 512
_LEVELS = (4, 2, 1)


def hierarchical_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """HCL of two features (N, C, H, W): the mean over the levels that are smaller than the map, by weight."""
    loss, weight, weights = F.mse_loss(student, teacher), 1.0, 1.0
    for level in _LEVELS:
        if level < student.shape[2]:
            weight /= 2
            weights += weight
            ours, theirs = (F.adaptive_avg_pool2d(values, level) for values in (student, teacher))
            loss = loss + weight * F.mse_loss(ours, theirs)
    return loss / weights


class Fusion(nn.Module):
    """One layer's features and what comes from the later ones -> the teacher's channels, and what goes on."""

    def __init__(self, channels: int, width: int, teacher_channels: int, first: bool) -> None:
        super().__init__()
        self.inward = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.outward = nn.Sequential(
            nn.Conv2d(width, teacher_channels, 3, padding=1, bias=False), nn.BatchNorm2d(teacher_channels)
        )
        self.attention = None if first else nn.Conv2d(2 * width, 2, 1)
        for part in (self.inward, self.outward):
            nn.init.kaiming_uniform_(part[0].weight, a=1)  # pyright: ignore[reportArgumentType]

    def forward(self, features: Tensor, later: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Features (N, C, H, W), later ones (N, width, h, w) -> (N, teacher's C, *size), (N, width, *size)."""
        fused = self.inward(features)
        if self.attention is not None:
            assert later is not None
            # a 1x1 convolution of both together is the sum of one of each, and may come before the enlarging
            of_fused, of_later = self.attention.weight.split(fused.shape[1], 1)
            enlarged = F.interpolate(F.conv2d(later, of_later), fused.shape[2:], mode="nearest")
            shares = torch.sigmoid(F.conv2d(fused, of_fused, self.attention.bias) + enlarged)
            later = F.interpolate(later, fused.shape[2:], mode="nearest")
            fused = torch.addcmul(fused * shares[:, :1], later, shares[:, 1:])
        if fused.shape[2:] != size:
            fused = F.interpolate(fused, size, mode="nearest")
        return self.outward(fused), fused


class ReviewTerm(RisingTerm):
    """The weighted sum over the layers, and the pooled last one."""

    name = "reviewkd"

    def __init__(self, pairs: Sequence[Pair], loss_weight: float) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.loss_weight = loss_weight
        width = min(_MOST_CHANNELS, pairs[-1].student_channels)
        channels = [(pair.student_channels, pair.teacher_channels) for pair in (pairs[-1], *reversed(pairs))]
        self.fusions = nn.ModuleList(Fusion(ours, width, theirs, i == 0) for i, (ours, theirs) in enumerate(channels))

    def forward(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The loss of one batch; the images' labels are not looked at."""
        assert teacher is not None
        ours = [as_map(student.layers[pair.student]) for pair in reversed(self.pairs)]
        theirs = [as_map(teacher.layers[pair.teacher]) for pair in reversed(self.pairs)]
        pooled = [F.adaptive_avg_pool2d(values[0], 1) for values in (ours, theirs)]
        later: Tensor | None = None
        losses: list[Tensor] = []
        for fusion, features, wanted in zip(self.fusions, (pooled[0], *ours), (pooled[1], *theirs), strict=True):
            with self.autocasting(batch):
                reviewed, later = fusion(features, later, tuple(wanted.shape[2:]))
            losses.append(hierarchical_loss(reviewed.float(), wanted))
        return self.rise * self.loss_weight * torch.stack(losses).sum()


@dataclass(frozen=True, config=PLAIN_VALUES)
class ReviewKD:
    """The features of a teacher, each compared with what the student's later layers know of them."""

    needs_teacher: ClassVar[bool] = True
    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"loss_weight": 0.6, "warmup": 0.5}
    off: ClassVar[dict[str, Any]] = {"loss_weight": 0.0}

    layers: Annotated[tuple[str, ...], Field(description="patterns; the last layer at each resolution if left")] = ()
    teacher_layers: Annotated[tuple[str, ...], Field(description="patterns; as `layers` if left")] = ()
    loss_weight: Annotated[float, Field(ge=0, description="0 leaves the labels as they are")] = 1.0
    label_weight: Annotated[float, Field(ge=0, description="factor on the labels' cross entropy")] = 1.0
    warmup: Annotated[float, Field(ge=0, lt=1, description="fraction of the stage over which the weight rises")] = 0.08
    seed: Annotated[int, Field(ge=0, description="of the fusions' weights")] = 0

    def attach(
        self,
        model: nn.Module,
        *,
        data: Iterable[Any] | None = None,
        teacher: nn.Module | None = None,
        steps: int = 0,
        target: Target | None = None,
    ) -> Attachment:
        """Builds the fusions; changes nothing in `model`.

        Raises:
            InputError: no teacher, no images to see shapes on, layers that are not there or do not pair.
        """
        pairs = pairs_of(model, teacher, self.layers, self.teacher_layers, data, method="reviewkd")
        if not self.loss_weight:
            return Attachment(model)
        with seeded(self.seed):
            term = ReviewTerm(pairs, self.loss_weight)
        paths = [pair.paths for pair in pairs]
        rising = round(self.warmup * steps)
        return RisingAttachment(model, term, steps=rising, label_weight=self.label_weight, layers=paths)
