"""A quantizer whose step is learned with the weights.

    x_hat = s * (clip(round(x / s) + z, n, p) - z)
    dx_hat/dx = 1 inside the range, 0 outside
    dx_hat/ds = round(x / s) - x / s inside, n - z below, p - z above
    dx_hat/dz = 0 inside, -s outside            where the offset is learned

Esser et al., "Learned Step Size Quantization", ICLR 2020; the offset: Bhalgat et al., "LSQ+", CVPR Workshops 2020. The
gradients of s and z are multiplied by 1 / sqrt(N p), so that a step moves as fast, for its size, as a weight does: N is
the number of values that share it, of one image where it is an activation's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.affine import Grid
from tersor.core.parametrization import FakeQuantize

_SMALLEST = 1e-6


class _Round(torch.autograd.Function):
    """Scale and zero point (R,) or (), both in float; along dimension 0 of the values, (R, ...), where there are R."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, factor: float) -> Tensor:
        shape = (-1, *[1] * (values.ndim - 1)) if scale.ndim else ()
        step, zero = scale.reshape(shape), zero_point.reshape(shape)
        steps = values / step
        reached = torch.round(steps).add_(zero)
        integers = reached.clamp(grid.minimum, grid.maximum)
        inside = integers == reached
        integers.sub_(zero)
        shown = integers * step
        ctx.save_for_backward(inside, torch.where(inside, integers - steps, integers), scale)
        ctx.factor = factor
        return shown

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        (gradient,) = gradients
        inside, slope, scale = ctx.saved_tensors
        through = gradient * inside
        of_scale = _gathered(gradient * slope, scale) * ctx.factor
        of_zero = None
        if ctx.needs_input_grad[2]:
            of_zero = -_gathered(gradient - through, scale) * scale * ctx.factor
        return through, of_scale, of_zero, None, None


def _gathered(values: Tensor, scale: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if scale.ndim else values.sum()


class LearnedFakeQuantize(FakeQuantize):
    """Rounds to a grid whose step is a Parameter, and whose zero point is one too if `offset`.

    Args:
        grid: the integers to round to.
        channels: number of steps, along dimension 0; None for one step for the whole tensor.
        offset: whether the zero point is learned; it is rounded where it is used.
        of_images: whether dimension 0 of the values are images, which do not count among those that share a step.
    """

    def __init__(
        self, grid: Grid, channels: int | None = None, *, offset: bool = False, of_images: bool = False
    ) -> None:
        super().__init__(grid, channels)
        self.of_images = of_images
        self.offset = offset
        del self.scale
        self.scale = nn.Parameter(torch.ones(() if channels is None else (channels,)))
        if offset:
            del self.zero_point
            self.zero_point = nn.Parameter(torch.zeros_like(self.scale))

    @torch.no_grad()
    def stay_on_the_grid(self) -> None:
        """After a step of the optimizer: the step stays above zero, a learned offset among the integers."""
        self.scale.clamp_(min=_SMALLEST)
        if self.offset:
            self.zero_point.clamp_(self.grid.minimum, self.grid.maximum)

    def forward(self, values: Tensor, *, moved: bool = False) -> Tensor:
        """`values` of any shape; (channels, ...) where there is a step for each channel. In float32."""
        if not self.ready:
            return values
        shared = values[0].numel() if self.of_images else values.numel() // self.scale.numel()
        factor = (shared * self.grid.maximum) ** -0.5
        zero_point = self.zero_point.float()
        zero_point = zero_point + (zero_point.round() - zero_point).detach()
        return _Round.apply(values.float(), self.scale, zero_point, self.grid, factor)  # pyright: ignore[reportReturnType]
