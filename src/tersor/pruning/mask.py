"""Weight masks, as parametrizations of the weights that they prune."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tersor.graph.parametrization import parametrizations_of

Gradient = Literal["kept", "all", "split"]


class Mask(nn.Module):
    """Shows a weight with zeros where it is masked.

    What gradient the weight gets from the gradient g of what is shown, with a mask m of ones and zeros:

        kept    m * g           the chain rule: what is masked stays as it was (`mask_attachment.py` sees to momentum
                                and weight decay)
        all     g               straight through, as if nothing were masked
        split   m * g           and, where the dense weight is shown (`masks_and_quantizers_disabled`), (1 - m) * g

    Args:
        shape: of the weight. All of it is shown until `mask` is set.
        gradient: which of the three.

    Attributes:
        dense: whether the weight is shown as it is for the moment.
    """

    mask: Tensor

    def __init__(self, shape: Sequence[int], gradient: Gradient = "kept") -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(tuple(shape), dtype=torch.bool))
        self.gradient: Gradient = gradient
        self.dense = False

    def forward(self, values: Tensor) -> Tensor:
        """`values` of the shape of the mask."""
        if self.dense:
            return torch.where(self.mask, values.detach(), values) if self.gradient == "split" else values
        zero = torch.zeros((), dtype=values.dtype, device=values.device)
        if self.gradient == "all":  # w - 0 and w - w are exact, and their gradient is that of the first w
            return values - torch.where(self.mask, zero, values.detach())
        return torch.where(self.mask, values, zero)

    def extra_repr(self) -> str:
        """How much is masked."""
        return f"sparsity={1 - self.mask.float().mean().item():.4f}, gradient={self.gradient}"


def weight_mask(module: nn.Module) -> Mask | None:
    """The mask of the module's weight, if it has one."""
    return next((each for each in parametrizations_of(module) if isinstance(each, Mask)), None)
