"""Rounding to a grid with one step for all values, in few passes over memory.

torch's own kernel takes three times as long on a CPU and keeps a mask for the backward pass. Here each pass is one that
is vectorised, and what lies inside the range is asked of the values again. They are rounded in float32, which would
merge integers in bfloat16, and shown as what they came as: under autocast, what the next layer reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor.quantization.grid import Grid

_SLACK = 1e-6
"""Of a step: a value on the last point counts as inside, whichever way its product was rounded."""


def rounds_here(values: Tensor, scale: Tensor) -> bool:
    """Whether there is one step for all values, and they lie where reading it as a number does not wait for a GPU."""
    return values.device.type == "cpu" and not scale.ndim and values.dtype in (torch.float32, torch.bfloat16)


class FixedStep(torch.autograd.Function):
    """Values of any shape on a grid; they are rounded before they are clipped, so half a step beyond is inside."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
        step, low, high = _numbers(scale, zero_point, grid)
        ctx.save_for_backward(values)
        ctx.ends = (low - 0.5) * step, (high + 0.5) * step
        return _rounded(values, step, low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,), (values,) = gradients, ctx.saved_tensors
        return _inside(gradient, values, *ctx.ends), None, None, None


class LearnedStep(torch.autograd.Function):
    """The same, clipped before they are rounded; step and offset get gradients, times `factor`.

    x_hat / s is n - z below, p - z above, and round(x / s) between, so that the gradient of s is that of x_hat - x
    inside and x_hat outside, over s; where an offset is learned, z more outside.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, _offset: Tensor | None, zero_point: Tensor, grid: Grid, factor: float
    ) -> Tensor:
        step, low, high = _numbers(scale, zero_point, grid)
        shown = _rounded(values, step, low, high)
        ctx.save_for_backward(values, shown)
        ctx.step, ctx.zero, ctx.factor = step, grid.minimum - low, factor
        ctx.ends = (low - _SLACK) * step, (high + _SLACK) * step
        return shown

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        (gradient,), (values, shown) = gradients, ctx.saved_tensors
        through = _inside(gradient, values, *ctx.ends)
        over = _inside(values, values, *ctx.ends).sub_(shown).mul_(gradient)
        of_scale = over.sum(dtype=torch.float32) / -ctx.step
        of_offset = None
        if ctx.needs_input_grad[2]:
            of_offset = (gradient - through).sum(dtype=torch.float32)
            of_scale += ctx.zero * of_offset
            of_offset *= ctx.factor
        return through, of_scale * ctx.factor, of_offset, None, None, None


def _numbers(scale: Tensor, zero_point: Tensor, grid: Grid) -> tuple[float, float, float]:
    zero = zero_point.item()
    return scale.item(), grid.minimum - zero, grid.maximum - zero


def _rounded(values: Tensor, step: float, low: float, high: float) -> Tensor:
    steps = values / step if values.dtype == torch.float32 else values.to(torch.float32).div_(step)
    return steps.round_().clamp_(low, high).mul_(step).to(values.dtype)


def _inside(wanted: Tensor, values: Tensor, low: float, high: float) -> Tensor:
    """`wanted` where `values` lie between, 0 elsewhere: the one kernel that compares and multiplies in one pass."""
    return torch.ops.aten.hardtanh_backward(wanted, values, low, high)
