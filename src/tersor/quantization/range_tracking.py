"""Modules that follow the range of values during training, as a part of a quantizer or of a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def scale_shape(channels: int | None) -> tuple[int, ...]:
    """The shape of the scales of a tensor: (channels,), or () for one scale."""
    return () if channels is None else (channels,)


class MovingAverage(nn.Module):
    """Running means of the smallest and largest activation of each batch, from which the grid is set.

    Args:
        averaging: weight of a batch in the means.

    Attributes:
        low: running mean of the smallest activations.
        high: running mean of the largest activations.
        active: whether the range still moves.
    """

    low: Tensor
    high: Tensor

    def __init__(self, averaging: float) -> None:
        super().__init__()
        self.averaging = averaging
        self.active = True
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def next_range(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The means after one more batch of `values`, of any shape."""
        low, high = torch.aminmax(values.detach())
        return self.low.lerp(low.float(), self.averaging), self.high.lerp(high.float(), self.averaging)

    def get_extra_state(self) -> Tensor:
        """Whether the range still moves."""
        return torch.tensor([self.active])

    def set_extra_state(self, state: Tensor) -> None:
        """Restores what `get_extra_state` returned."""
        self.active = bool(state[0])


class WeightShare(nn.Module):
    """The share of a weight's range that its grid spans; it stays constant while the weight is trained.

    Args:
        channels: number of scales; None for one scale for the whole weight.

    Attributes:
        share: a fraction for each scale.
    """

    share: Tensor

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        self.register_buffer("share", torch.ones(scale_shape(channels)))


class RunningLargest(nn.Module):
    """Returns a weight unchanged, and keeps a running mean of its largest absolute value.

    Args:
        channels: number of values, along dimension 0; None for one value for the whole weight.
    """

    largest: Tensor

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(scale_shape(channels)))

    def follow(self, weight: Tensor, *, first: bool, momentum: float = 0.1) -> None:
        """Adds a weight (C, ...) to the mean, or starts it there if it is the `first`."""
        largest = weight.detach().float().abs().flatten(1).amax(1)
        self.largest.lerp_(largest if self.largest.ndim else largest.max(), 1.0 if first else momentum)

    def forward(self, values: Tensor) -> Tensor:
        """`values`."""
        return values
