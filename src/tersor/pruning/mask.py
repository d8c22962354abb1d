"""Weight masks: parametrizations that set weights to zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tersor.graph.layer_selection import weighted_layers
from tersor.graph.parametrization import original_weight, parametrizations_of

Gradient = Literal["masked", "straight_through", "split"]
"""The gradient of a weight under a mask.

`masked`: masked weights have no gradient and stay constant, in this stage and in all later ones. `straight_through`:
all weights are trained as if there were no mask, so that masked weights can become active again. `split`: as `masked`,
but masked weights get their gradient from a second forward pass, with the dense weights (`dcil`).
"""

_WORTH_A_NOTE = 0.01
"""Fraction of the weights."""


class Mask(nn.Module):
    """Multiplies a weight by a mask m of ones and zeros.

    The gradient of the dense weight, where g is that of the masked weight:

        masked              m * g   the chain rule: masked weights are not trained (`mask_attachment.py` also undoes
                                    momentum and weight decay)
        straight_through    g       as if nothing were masked
        split               m * g   and (1 - m) * g on the dense path (`masks_and_quantizers_disabled`)

    Args:
        shape: shape of the weight; the mask starts with ones.
        gradient: one of the three.

    Attributes:
        mask: m, a bool tensor of the weight's shape.
        dense: whether the mask is disabled.
    """

    mask: Tensor

    def __init__(self, shape: Sequence[int], gradient: Gradient = "masked") -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(tuple(shape), dtype=torch.bool))
        self.gradient: Gradient = gradient
        self.dense = False

    def forward(self, values: Tensor) -> Tensor:
        """The masked weight, of the mask's shape."""
        if self.dense:
            return torch.where(self.mask, values.detach(), values) if self.gradient == "split" else values
        zero = torch.zeros((), dtype=values.dtype, device=values.device)
        if self.gradient == "straight_through":  # w - 0 and w - w are exact, with the gradient of the first w
            return values - torch.where(self.mask, zero, values.detach())
        return torch.where(self.mask, values, zero)

    def extra_repr(self) -> str:
        """The sparsity and the gradient."""
        return f"sparsity={1 - self.mask.float().mean().item():.4f}, gradient={self.gradient}"


def weight_mask(module: nn.Module) -> Mask | None:
    """The mask of the module's weight, if it has one."""
    return next((each for each in parametrizations_of(module) if isinstance(each, Mask)), None)


def unmasked_zeros(model: nn.Module) -> dict[str, Tensor]:
    """Where the Parameters of the layers are zero without a mask: layer -> bool (C_out, ...)."""
    zeros: dict[str, Tensor] = {}
    for name, layer in weighted_layers(model).items():
        mask, zero = weight_mask(layer), original_weight(layer) == 0
        zeros[name] = zero if mask is None else zero & mask.mask
    return zeros


def note_of_lost_zeros(zeros: Mapping[str, Tensor], model: nn.Module) -> tuple[str, ...]:
    """A note for the user if a stage has changed more than 1 % of the weights that were zero without a mask.

    Args:
        zeros: `unmasked_zeros` before the stage.
        model: after the stage.
    """
    lost = total = 0
    for name, layer in weighted_layers(model).items():
        weight, mask = original_weight(layer), weight_mask(layer)
        total += weight.numel()
        if name in zeros and zeros[name].shape == weight.shape:
            remaining = weight != 0 if mask is None else (weight != 0) & mask.mask
            lost += int((zeros[name] & remaining).sum())
    if lost <= _WORTH_A_NOTE * total:
        return ()
    share = f"{100 * lost / total:.1f} % of the weights were zero before this stage and are not zero after it"
    advice = (
        "In a recipe, put weight_pruning into the same stage, with a sparsity of at least the fraction of zeros before "
        "it; in your own method, call tersor.training.mask_attachment.insert_masks."
    )
    return (f"{share}: training changes zeros that no mask covers. {advice}",)
