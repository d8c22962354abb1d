"""Fake quantization: a tensor rounded to a grid, in floating point, as a parametrization or on an edge of the graph."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tersor.graph.parametrization import parametrizations_of
from tersor.quantization.grid import Grid, affine_parameters
from tersor.quantization.observers import weight_grid
from tersor.quantization.straight_through import FixedStep, rounds_here


class FakeQuantize(nn.Module):
    """Shows a tensor rounded to a grid, in floating point; the gradient passes straight through inside the range.

    Until `ready` it shows the tensor as it is. Scale and zero point are buffers, and `ready` is part of the
    `state_dict`: a checkpoint holds everything.

    Args:
        grid: the integers to round to.
        channels: number of scales, along dimension 0; None for one scale for the whole tensor.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid, channels: int | None = None) -> None:
        super().__init__()
        self.grid = grid
        self.enabled = False
        shape = () if channels is None else (channels,)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))

    def set_grid(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """From now on values are rounded: `scale` and `zero_point` are scalars, or (channels,)."""
        with torch.no_grad():
            self.scale.copy_(scale)
            self.zero_point.copy_(torch.zeros_like(self.zero_point) if zero_point is None else zero_point)
        self.enabled = True

    def forward(self, values: Tensor, *, moved: bool = False) -> Tensor:
        """`values` of any shape; (channels, ...) where there is a scale for each channel.

        `moved` ones are those of another call, in another place or shape: here that changes nothing.
        """
        if not self.enabled:
            return values
        if rounds_here(values, self.scale):
            return FixedStep.apply(values, self.scale, self.zero_point, self.grid)
        values = values.float()
        if self.scale.ndim:
            return torch.fake_quantize_per_channel_affine(
                values, self.scale, self.zero_point, 0, self.grid.minimum, self.grid.maximum
            )
        return torch.fake_quantize_per_tensor_affine(
            values, self.scale, self.zero_point, self.grid.minimum, self.grid.maximum
        )

    def get_extra_state(self) -> Tensor:
        """Whether values are rounded, and to which integers, as a tensor, so that it lies in the `state_dict`."""
        return torch.tensor([self.enabled, self.grid.minimum, self.grid.maximum])

    def set_extra_state(self, state: Tensor) -> None:
        """Takes back what `get_extra_state` gave."""
        ready, minimum, maximum = state.tolist()
        self.enabled, self.grid = bool(ready), Grid(minimum, maximum)

    def extra_repr(self) -> str:
        """Bits and range of the grid."""
        return f"{self.grid.minimum}..{self.grid.maximum}, channels={self.scale.numel()}, ready={self.enabled}"


class EMAFakeQuantize(FakeQuantize):
    """One whose range follows what it is shown while the network trains: a running mean of minimum and maximum.

    Args:
        grid: the integers to round to.
        averaging: what a batch's minimum and maximum weigh in the mean.
    """

    low: Tensor
    high: Tensor

    def __init__(self, grid: Grid, averaging: float) -> None:
        super().__init__(grid)
        self.averaging = averaging
        self.moves = True
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """From now on values are rounded to a grid over [`low`, `high`], two scalars; zero is always on it."""
        self.low.copy_(low)
        self.high.copy_(high)
        self.set_grid(*affine_parameters(self.low, self.high, self.grid))

    def forward(self, values: Tensor, *, moved: bool = False) -> Tensor:
        """`values` of any shape; `moved` ones are those of another call, which has moved the range already."""
        if self.training and self.moves and self.enabled and not moved:
            low, high = torch.aminmax(values.detach())
            self.set_range(self.low.lerp(low.float(), self.averaging), self.high.lerp(high.float(), self.averaging))
        return super().forward(values)

    def get_extra_state(self) -> Tensor:
        """What the base class tells, and whether the range follows the values."""
        return torch.cat([super().get_extra_state(), torch.tensor([self.moves])])

    def set_extra_state(self, state: Tensor) -> None:
        """Takes back what `get_extra_state` gave."""
        super().set_extra_state(state[:3])
        self.moves = bool(state[3])


class WeightTrackingFakeQuantize(FakeQuantize):
    """One on a weight that trains: its grid spans the same share of the weight's range wherever that goes.

    Args:
        grid: the integers to round to.
        channels: number of scales, along dimension 0; None for one scale for the whole weight.
    """

    share: Tensor

    def __init__(self, grid: Grid, channels: int | None = None) -> None:
        super().__init__(grid, channels)
        self.register_buffer("share", torch.ones_like(self.scale))

    def start(self, weight: Tensor) -> None:
        """Finds the share that the grid, which was set, spans of `weight` (C, ...); of zeros alone it is all."""
        whole = weight_grid(weight, self.grid, per_channel=bool(self.scale.ndim))[0]
        some = weight.flatten(1).any(1) if self.scale.ndim else weight.any()
        self.share.copy_(torch.where(some, self.scale / whole, 1.0))

    def follow(self, weight: Tensor) -> None:
        """Sets the grid for `weight` (C, ...)."""
        self.set_grid(*weight_grid(weight, self.grid, per_channel=bool(self.scale.ndim), share=self.share))


class RunningLargest(nn.Module):
    """Shows a weight as it is, and remembers a running mean of its largest absolute value.

    Args:
        channels: number of values, along dimension 0; None for one value for the whole weight.
    """

    largest: Tensor

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(() if channels is None else (channels,)))

    def follow(self, weight: Tensor, *, first: bool, momentum: float = 0.1) -> None:
        """Takes a weight (C, ...) into the mean; the first one is taken as it is."""
        found = weight.detach().float().abs().flatten(1).amax(1)
        self.largest.lerp_(found if self.largest.ndim else found.max(), 1.0 if first else momentum)

    def forward(self, values: Tensor) -> Tensor:
        """`values`."""
        return values


@contextmanager
def quantizers_disabled(model: nn.Module) -> Generator[None]:
    """Nothing is rounded in `model`: neither weights nor activations. Masks stay."""
    rounding = [each for each in model.modules() if isinstance(each, FakeQuantize) and each.enabled]
    for quantizer in rounding:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in rounding:
            quantizer.enabled = True


def weight_quantizer(module: nn.Module) -> FakeQuantize | None:
    """The quantizer of the module's weight, if it has one that rounds already."""
    quantizers = (each for each in parametrizations_of(module) if isinstance(each, FakeQuantize))
    return next((each for each in quantizers if each.enabled), None)
