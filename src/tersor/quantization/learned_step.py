"""A quantizer whose step is learned with the weights.

    x_hat = s * (round(clip(x / s + z, n, p)) - z)
    dx_hat/dx = 1 inside the range, n <= x / s + z <= p, 0 outside
    dx_hat/ds = round(x / s) - x / s inside, n - z below, p - z above

Where the offset is learned, it is o = -z s, in the unit of the values, and z = round(-o / s):

    dx_hat/do = 0 inside, 1 outside;    dx_hat/ds = n below, p above

Esser et al., "Learned Step Size Quantization", ICLR 2020; the offset: Bhalgat et al., "LSQ+", CVPR Workshops 2020. The
gradients of s and o are multiplied by 1 / sqrt(N p), so that a step moves as fast, for its size, as a weight does: N is
the number of values that share it, of one image where it is an activation's.

Values up to half a step beyond the last point are outside, as in both papers; torch's own kernel, BRECQ and QDrop round
before they clip: the same x_hat, but there such values count as inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid
from tersor.quantization.straight_through import LearnedStep, rounds_here

_SMALLEST = 1e-6


class _Round(torch.autograd.Function):
    """Step, offset and zero point (R,) or (); along dimension 0 of the values (R, ...) where there are R."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, offset: Tensor | None, zero_point: Tensor, grid: Grid, factor: float
    ) -> Tensor:
        shape = (-1, *[1] * (values.ndim - 1)) if scale.ndim else ()
        step, zero = scale.reshape(shape), zero_point.reshape(shape)
        steps = values / step
        integers = steps.clamp(grid.minimum - zero, grid.maximum - zero)
        inside = integers == steps
        integers.round_()
        outside = integers if offset is None else integers + zero
        ctx.save_for_backward(inside, torch.where(inside, integers - steps, outside), scale)
        ctx.factor = factor
        return integers.mul_(step)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        (gradient,) = gradients
        inside, slope, scale = ctx.saved_tensors
        through = gradient * inside
        of_scale = _gathered(gradient * slope, scale) * ctx.factor
        of_offset = _gathered(gradient - through, scale) * ctx.factor if ctx.needs_input_grad[2] else None
        return through, of_scale, of_offset, None, None, None


def _gathered(values: Tensor, scale: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if scale.ndim else values.sum()


class LearnedFakeQuantize(FakeQuantize):
    """Rounds to a grid whose step is a Parameter.

    Args:
        grid: the integers to round to.
        channels: number of steps, along dimension 0; None for one step for the whole tensor.
        offset: whether the offset is a Parameter too, which the zero point follows.
        of_images: whether dimension 0 of the values are images, which do not count among those that share a step.
    """

    offset: Tensor | None

    def __init__(
        self, grid: Grid, channels: int | None = None, *, offset: bool = False, of_images: bool = False
    ) -> None:
        super().__init__(grid, channels)
        self.of_images = of_images
        del self.scale
        self.scale = nn.Parameter(torch.ones(() if channels is None else (channels,)))
        self.register_parameter("offset", nn.Parameter(torch.zeros_like(self.scale)) if offset else None)

    @torch.no_grad()
    def set_grid(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """From now on values are rounded: `scale` and `zero_point` are scalars, or (channels,)."""
        super().set_grid(scale, zero_point)
        if self.offset is not None:
            self.offset.copy_(-self.zero_point * self.scale)

    @torch.no_grad()
    def follow(self) -> None:
        """After a step of the optimizer: the step stays above zero, and the zero point follows the offset."""
        self.scale.clamp_(min=_SMALLEST)
        if self.offset is not None:
            zero_point = torch.round(-self.offset / self.scale).clamp(self.grid.minimum, self.grid.maximum)
            self.zero_point.copy_(zero_point)

    def forward(self, values: Tensor, *, moved: bool = False) -> Tensor:
        """`values` of any shape; (channels, ...) where there is a step for each channel."""
        if not self.enabled:
            return values
        shared = values[0].numel() if self.of_images else values.numel() // self.scale.numel()
        factor = (shared * self.grid.maximum) ** -0.5
        given = (self.scale, self.offset, self.zero_point, self.grid, factor)
        if rounds_here(values, self.scale):
            return LearnedStep.apply(values, *given)  # pyright: ignore[reportReturnType]
        return _Round.apply(values.float(), *given)  # pyright: ignore[reportReturnType]  # torch does not tell what it gives
