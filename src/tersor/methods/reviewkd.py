"""Knowledge review: later student features are fused into earlier ones, and each is compared with the teacher's.

Chen, Liu, Zhao and Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021.

    from the last layer to the first, of features A_i (N, C_i, H_i, W_i):
        x_i = 1x1 convolution of A_i to m channels;  where there is a later layer:
        x_i = a_i * x_i + b_i * up(x_(i+1)),   (a_i, b_i) = sigmoid of a 1x1 convolution of both
        R_i = 3x3 convolution of x_i to the teacher's channels
    L = warm-up * loss_weight * sum over i of HCL(R_i, T_i)
    HCL(r, t): mean squared distance of r and t, and of both pooled to 4x4, 2x2 and 1x1, with weights 1, 1/2, ...

The authors' code adds the pooled features before the classifier as one more layer, and compares features before the
last ReLU of a stage. Here the outputs of the named layers are compared, and also the pooled output of the last of them.
As in the code, m is the number of channels of the student's last layer, at most 512, and the weight has a warm-up (in
the code, over 20 of 240 epochs).

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
from tersor.core.plain_values import plain_dataclass
from tersor.data.batch import Batch
from tersor.graph.feature_extraction import as_map, layer_paths
from tersor.training.attachment import Attachment, without_loss
from tersor.training.context import AttachContext
from tersor.training.layer_pairs import LayerPair, match_layers
from tersor.training.loss_warmup import WarmupAttachment, WarmupLossTerm
from tersor.training.method import PLAIN_VALUES
from tersor.training.objective import Outputs

_MAX_CHANNELS = 512
_LEVELS = (4, 2, 1)


class _MeanSquare(torch.autograd.Function):
    """Mean of squares in float32, of values of any precision, in one pass forward and one backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return torch.linalg.vector_norm(values, dtype=torch.float32).square() / values.numel()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,), (values,) = gradients, ctx.saved_tensors
        return values * (2 / values.numel() * gradient).to(values.dtype)


class _Moments(torch.autograd.Function):
    """Mean (C,) and covariance (C, C) of the rows of values (P, C), with one matrix product each way."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        mean = values.mean(0)
        centred = values - mean
        ctx.save_for_backward(centred)
        return mean, centred.T @ centred / len(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (of_mean, of_covariance), (centred,) = gradients, ctx.saved_tensors
        return torch.addmm(of_mean / len(centred), centred, (of_covariance + of_covariance.T) / len(centred))


def hierarchical_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """HCL of two feature maps (N, C, H, W): the weighted mean over the map and all smaller levels."""
    distance = student - teacher.to(student.dtype)
    loss, weight, weights = _MeanSquare.apply(distance), 1.0, 1.0
    height, width = student.shape[2:]
    nested = not (height % _LEVELS[0] or width % _LEVELS[0])  # then each level can be pooled from the previous one
    for level in _LEVELS:
        if level < height:
            weight /= 2
            weights += weight
            pooled = F.adaptive_avg_pool2d(distance, level)
            loss = loss + weight * _MeanSquare.apply(pooled)
            if nested:
                distance = pooled
    return loss / weights


def _batch_norm(norm: nn.Module, values: Tensor) -> Tensor:
    """Apply BatchNorm to (N, C, H, W); with one value per channel, use the running statistics."""
    assert isinstance(norm, nn.BatchNorm2d)
    if values.numel() > values.shape[1]:
        return norm(values)
    return F.batch_norm(values, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


class Fusion(nn.Module):
    """A layer's features and the fused features of later layers -> the teacher's channels, new fused features.

    Everything but the sigmoid is linear, and most of the time goes into writing maps of `width` channels. So the 1x1
    convolution and its BatchNorm become one matrix, applied after the multiplication by a_i, which then has the
    channels of the layer, fewer than `width`; at the first layer the matrix is merged into the kernel of the 3x3
    convolution.

    Args:
        channels: channels of the student's layer.
        width: m.
        teacher_channels: channels of the teacher's layer.
        place: 0 for the pooled output of the last layer, 1 for the last layer, and so on backwards.
        last: place of the first layer, whose fused features are not needed.
    """

    def __init__(self, channels: int, width: int, teacher_channels: int, place: int, last: int) -> None:
        super().__init__()
        self.inward = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.outward = nn.Sequential(
            nn.Conv2d(width, teacher_channels, 3, padding=1, bias=False), nn.BatchNorm2d(teacher_channels)
        )
        self.attention = nn.Conv2d(2 * width, 2, 1) if place else None
        self.returns_fused = place < last
        for part in (self.inward, self.outward):
            nn.init.kaiming_uniform_(part[0].weight, a=1)  # pyright: ignore[reportArgumentType]

    def forward(self, features: Tensor, later: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Features (N, C, H, W), fused (N, width, h, w) -> (N, teacher's C, *size), fused (N, width, *size)."""
        weight, shift = self._inward(features)
        if torch.is_autocast_enabled(features.device.type):
            features = features.to(torch.get_autocast_dtype(features.device.type))
        if self.attention is None:
            return self._outward(F.conv2d(features, weight[:, :, None, None], shift), size)
        bias = self.attention.bias
        assert later is not None
        assert bias is not None
        of_own, of_later = self.attention.weight.split(len(weight), 1)
        of_own = of_own.flatten(1)
        enlarged = F.interpolate(F.conv2d(later, of_later), features.shape[2:], mode="nearest")
        at_own = F.conv2d(features, (of_own @ weight)[:, :, None, None], of_own @ shift + bias)
        shares = (at_own + enlarged).sigmoid()
        share = shares[:, :1]
        own = torch.cat([features * share, share], 1)  # the last channel multiplies the shift
        inward = torch.cat([weight, shift[:, None]], 1)
        theirs = F.interpolate(later, features.shape[2:], mode="nearest") * shares[:, 1:]
        if self.returns_fused or features.shape[2:] != size:
            return self._outward(F.conv2d(own, inward[:, :, None, None]) + theirs, size)
        convolution, norm = self.outward
        kernel = torch.einsum("omhw,mc->ochw", convolution.weight, inward)
        return _batch_norm(norm, F.conv2d(own, kernel, padding=1) + convolution(theirs)), None

    def _outward(self, fused: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        if fused.shape[2:] != size:
            fused = F.interpolate(fused, size, mode="nearest")
        convolution, norm = self.outward
        return _batch_norm(norm, convolution(fused)), fused

    def _inward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """W (width, C) and t (width,) of the 1x1 convolution with its BatchNorm: W x + t at every pixel x.

        In training mode, mean and variance of the convolution's output follow from mean and covariance of its input;
        for a single pixel they are the running ones.
        """
        convolution, norm = self.inward
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        mean, variance, momentum = norm.running_mean, norm.running_var, norm.momentum
        assert mean is not None
        assert variance is not None
        assert momentum is not None
        with torch.autocast(features.device.type, enabled=False):
            weight = convolution.weight.flatten(1)
            pixels = features.permute(0, 2, 3, 1).flatten(0, 2)
            if norm.training and len(pixels) > 1:
                middle, covariance = _Moments.apply(pixels)
                now = weight @ middle, (weight @ covariance * weight).sum(1).clamp(min=0)
                with torch.no_grad():
                    mean.lerp_(now[0], momentum)
                    variance.lerp_(now[1] * len(pixels) / (len(pixels) - 1), momentum)
                mean, variance = now
            gain = norm.weight * (variance + norm.eps).rsqrt()
            return weight * gain[:, None], norm.bias - mean * gain


class ReviewTerm(WarmupLossTerm):
    """The weighted sum over the layers and the pooled output of the last layer."""

    name = "reviewkd"

    def __init__(self, pairs: Sequence[LayerPair], loss_weight: float) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.loss_weight = loss_weight
        width = min(_MAX_CHANNELS, pairs[-1].student_channels)
        channels = [(pair.student_channels, pair.teacher_channels) for pair in (pairs[-1], *reversed(pairs))]
        self.fusions = nn.ModuleList(
            Fusion(ours, width, theirs, place, len(pairs)) for place, (ours, theirs) in enumerate(channels)
        )

    def forward(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The loss of one batch; labels are not used."""
        assert teacher is not None
        ours = [as_map(student.layers[pair.student]) for pair in reversed(self.pairs)]
        theirs = [as_map(teacher.layers[pair.teacher]) for pair in reversed(self.pairs)]
        pooled = [F.adaptive_avg_pool2d(values[0], 1) for values in (ours, theirs)]
        later: Tensor | None = None
        losses: list[Tensor] = []
        for fusion, features, target in zip(self.fusions, (pooled[0], *ours), (pooled[1], *theirs), strict=True):
            with student.context.autocasting(batch):
                reviewed, later = fusion(features, later, tuple(target.shape[2:]))
            losses.append(hierarchical_loss(reviewed, target))
        return self.warmup * self.loss_weight * torch.stack(losses).sum()


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class ReviewKD:
    """Matches the teacher's features at several layers with fused student features (knowledge review)."""

    needs_teacher: ClassVar[bool] = True
    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"loss_weight": 0.6, "warmup": 0.5}
    off: ClassVar[dict[str, Any]] = {"loss_weight": 0.0}

    layers: Annotated[
        tuple[str, ...], Field(description="patterns of student layers; default: the last layer at each resolution")
    ] = ()
    teacher_layers: Annotated[
        tuple[str, ...], Field(description="patterns of teacher layers; default: the same as `layers`")
    ] = ()
    loss_weight: Annotated[float, Field(ge=0, description="weight of the loss; 0 turns it off")] = 1.0
    label_weight: Annotated[float, Field(ge=0, description="weight of the task's loss on the labels")] = 1.0
    warmup: Annotated[float, Field(ge=0, lt=1, description="fraction of the stage over which the weight rises")] = 0.08
    seed: Annotated[int, Field(ge=0, lt=2**32, description="seed of the fusion modules' weights")] = 0

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Build the fusion modules; changes nothing in `model`.

        Raises:
            InputError: no teacher, no images, or layers that do not exist or cannot be paired.
        """
        pairs = match_layers(model, context.teacher, self.layers, self.teacher_layers, context.data, method="reviewkd")
        if not self.loss_weight:
            return without_loss(model, self.label_weight)
        order = layer_paths(model)
        pairs.sort(key=lambda pair: order.index(pair.student))  # later layers are fused into earlier ones
        with seeded(self.seed):
            term = ReviewTerm(pairs, self.loss_weight)
        paths = [pair.paths for pair in pairs]
        steps = round(self.warmup * context.steps)
        return WarmupAttachment(model, term, steps=steps, label_weight=self.label_weight, layers=paths)
