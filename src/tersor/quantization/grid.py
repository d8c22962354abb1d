"""The affine grid: a range of values -> scale and zero point; a value -> its nearest point on the grid.

    q = clip(round(x / scale) + zero_point, minimum, maximum),   x_hat = (q - zero_point) * scale

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", CVPR 2018. A range of width zero gets scale 1, because a runtime divides by the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The integers that values are rounded to: `minimum` to `maximum`, inclusive.

    Attributes:
        minimum: the smallest integer.
        maximum: the largest integer.
    """

    minimum: int
    maximum: int

    @staticmethod
    def signed(bits: int) -> Grid:
        """Symmetric around zero: -127..127 for 8 bits, -1..1 for 2."""
        return Grid(-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)

    @staticmethod
    def full(bits: int) -> Grid:
        """All signed integers, for grids with a zero point: -128..127 for 8 bits."""
        return Grid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    @staticmethod
    def unsigned(bits: int) -> Grid:
        """0..255 for 8 bits."""
        return Grid(0, 2**bits - 1)

    @property
    def bits(self) -> int:
        """Number of bits that represent every integer of the grid."""
        return (self.maximum - self.minimum).bit_length()

    @property
    def symmetric(self) -> bool:
        """Whether zero is in the middle, so that no zero point is needed."""
        return self.minimum == -self.maximum


def symmetric_scale(largest: Tensor, grid: Grid) -> Tensor:
    """The scale at which `largest` (>= 0, any shape) is the grid's last point; 1 where `largest` is 0."""
    scale = largest.float() / grid.maximum
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))


def affine_parameters(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int32) for values in [`low`, `high`]; zero is always a point of the grid."""
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    scale = (high - low) / (grid.maximum - grid.minimum)
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    zero_point = (grid.minimum - torch.round(low / scale)).clamp(grid.minimum, grid.maximum)
    return scale, zero_point.to(torch.int32)


def to_integers(values: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Integers (int32) of `values`; `scale` and `zero_point` broadcast against them. Ties go to even."""
    return (torch.round(values / scale) + zero_point).clamp(grid.minimum, grid.maximum).to(torch.int32)
