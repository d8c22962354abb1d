"""Rounding to a grid, and its gradients: straight-through, and with a learned step.

    fixed step     x_hat = s * (clip(round(x / s) + z, n, p) - z)
                   dx_hat/dx = 1 where round(x / s) + z is on the grid, 0 elsewhere

    learned step   x_hat = s * (round(clip(x / s + z, n, p)) - z)
                   dx_hat/dx = 1 where n <= x / s + z <= p, 0 elsewhere
                   dx_hat/ds = round(x / s) - x / s inside, n - z below, p - z above

A learned offset is o = -z s, in the unit of the values, with z = round(-o / s):

                   dx_hat/do = 0 inside, 1 outside;    dx_hat/ds = n below, p above

Esser et al., "Learned Step Size Quantization", ICLR 2020; the offset: Bhalgat et al., "LSQ+", CVPR Workshops 2020. The
gradients of s and o are multiplied by 1 / sqrt(N p), so that a step moves as fast, relative to its size, as a weight: N
is the number of values that share it, in one image for an activation.

LSQ clips before it rounds, so values up to half a step beyond the last point are outside; torch's own kernel, BRECQ and
QDrop round first: x_hat is the same, but those values count as inside.

On a CPU, one step for all values takes two passes over memory here, a third of the time of torch's kernel, and keeps no
mask for the backward pass. bfloat16 would merge integers, so values are rounded in float32 and returned in their own
precision, in which the next layer reads them under autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor.quantization.grid import Grid

_SLACK = 1e-6
"""Tolerance in steps: a value on the last point counts as inside, however the product was rounded."""


def fake_quantize(values: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Rounds `values`, of any shape, or (channels, ...) where scale and zero point are (channels,)."""
    if _on_cpu_with_one_step(values, scale):
        return _FixedStep.apply(values, scale, zero_point, grid)
    values = values.float()
    if scale.ndim:
        return torch.fake_quantize_per_channel_affine(values, scale, zero_point, 0, grid.minimum, grid.maximum)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, grid.minimum, grid.maximum)


def fake_quantize_learned(
    values: Tensor, scale: Tensor, offset: Tensor | None, zero_point: Tensor, grid: Grid, factor: float
) -> Tensor:
    """The same, with gradients for `scale` and `offset`, which are multiplied by `factor`."""
    arguments = (values, scale, offset, zero_point, grid, factor)
    if _on_cpu_with_one_step(values, scale):
        return _LearnedStep.apply(*arguments)  # pyright: ignore[reportReturnType]
    return _LearnedSteps.apply(values.float(), *arguments[1:])  # pyright: ignore[reportReturnType]  # torch leaves apply untyped


def _on_cpu_with_one_step(values: Tensor, scale: Tensor) -> bool:
    """Reading a step as a Python number would make a GPU wait."""
    return values.device.type == "cpu" and not scale.ndim and values.dtype in (torch.float32, torch.bfloat16)


class _FixedStep(torch.autograd.Function):
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


class _LearnedStep(torch.autograd.Function):
    """One step for all values: the gradient is (x_hat - x) / s inside, and x_hat / s outside, plus z with an offset."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, _offset: Tensor | None, zero_point: Tensor, grid: Grid, factor: float
    ) -> Tensor:
        step, low, high = _numbers(scale, zero_point, grid)
        ctx.save_for_backward(values)
        ctx.grid, ctx.zero, ctx.factor = (step, low, high), grid.minimum - low, factor
        ctx.ends = (low - _SLACK) * step, (high + _SLACK) * step
        return _rounded(values, step, low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        (gradient,), (values,) = gradients, ctx.saved_tensors
        through = _inside(gradient, values, *ctx.ends)
        rounded = _rounded(values, *ctx.grid)  # again: the network may have changed the output in place
        over = _inside(values, values, *ctx.ends).sub_(rounded).mul_(gradient)
        of_scale = over.sum(dtype=torch.float32) / -ctx.grid[0]
        of_offset = None
        if ctx.needs_input_grad[2]:
            of_offset = (gradient - through).sum(dtype=torch.float32)
            of_scale += ctx.zero * of_offset
            of_offset *= ctx.factor
        return through, of_scale * ctx.factor, of_offset, None, None, None


class _LearnedSteps(torch.autograd.Function):
    """Step, offset and zero point are (channels,) or (); in the first case values are (channels, ...)."""

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
        of_scale = _sum_per_step(gradient * slope, scale) * ctx.factor
        of_offset = _sum_per_step(gradient - through, scale) * ctx.factor if ctx.needs_input_grad[2] else None
        return through, of_scale, of_offset, None, None, None


def _sum_per_step(values: Tensor, scale: Tensor) -> Tensor:
    return values.flatten(1).sum(1) if scale.ndim else values.sum()


def _numbers(scale: Tensor, zero_point: Tensor, grid: Grid) -> tuple[float, float, float]:
    zero = zero_point.item()
    return scale.item(), grid.minimum - zero, grid.maximum - zero


def _rounded(values: Tensor, step: float, low: float, high: float) -> Tensor:
    steps = values / step if values.dtype == torch.float32 else values.to(torch.float32).div_(step)
    return steps.round_().clamp_(low, high).mul_(step).to(values.dtype)


def _inside(selected: Tensor, values: Tensor, low: float, high: float) -> Tensor:
    """`selected` where `values` lie in between, 0 elsewhere, in one pass."""
    return torch.ops.aten.hardtanh_backward(selected, values, low, high)
