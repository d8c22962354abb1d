"""Masks during training: insertion, frozen masked weights, updates of the masks, and the mask log.

w (C_out, ...) is a dense weight, m its mask, m * w the masked weight. Where the gradient of a mask is `masked`, masked
weights do not move, in the stage of their method and in all later ones: momentum and weight decay would move them, so
they are restored after every step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from tersor.core.distributed import broadcast_from_rank0
from tersor.core.errors import CompressionWarning, InputError, unknown
from tersor.graph.layer_selection import Layer
from tersor.graph.parametrization import parametrizations_of, parametrized
from tersor.pruning.mask import Gradient, Mask, weight_mask
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.training.attachment import Attachment
from tersor.training.mask_log import MaskLog, log_interval
from tersor.training.objective import LossTerm

MaskedLayers = Annotated[
    tuple[str, ...],
    Field(
        description="patterns of the layers to mask; default: all convolutions, or all fully connected layers if there "
        "is no convolution"
    ),
]
"""The parameter `layers` of the methods that mask weights."""


def check_floor(floor: float, sparsity: float) -> None:
    """Check that the floor leaves enough weights to mask.

    Raises:
        InputError: it does not.
    """
    if floor > 1 - sparsity and not math.isclose(floor, 1 - sparsity):
        raise InputError(
            f"a floor of {floor:g} allows a sparsity of {1 - floor:g} at most, got {sparsity:g}. Write a lower floor "
            "or sparsity."
        )


def insert_masks(layers: Mapping[str, Layer], gradient: Gradient, method: str) -> None:
    """Put a mask of ones on every weight without one; all masks then use this `gradient`.

    Args:
        layers: by name.
        gradient: "masked": masked weights stay constant; "straight_through": they are trained too; "split": as in
            `dcil`.
        method: name of the method in error messages.

    Raises:
        InputError: a weight is already quantized, or there is no such gradient.
    """
    if gradient not in get_args(Gradient):
        raise unknown("gradient", str(gradient), get_args(Gradient))
    for name, layer in layers.items():
        if any(isinstance(each, FakeQuantize) for each in parametrizations_of(layer)):
            raise InputError(
                f"the weight of {name} is already quantized, but masks come before quantizers. "
                f"Write {method} before ptq and qat."
            )
    for layer in layers.values():
        if weight_mask(layer) is None:
            mask = Mask(layer.weight.shape).to(layer.weight.device)
            parametrize.register_parametrization(layer, "weight", mask)
        mask_of(layer).gradient = gradient


def mask_of(layer: Layer) -> Mask:
    """The mask of a layer.

    Raises:
        InputError: it has none.
    """
    mask = weight_mask(layer)
    if mask is None:
        described = f"{type(layer).__name__}({layer.extra_repr()})"
        raise InputError(f"the layer {described} has no mask. Call insert_masks(layers, gradient, method) first.")
    return mask


def dense_weight(layer: Layer) -> nn.Parameter:
    """The Parameter under the mask, (C_out, ...)."""
    weight = parametrized(layer).original
    assert isinstance(weight, nn.Parameter)
    return weight


class FrozenMaskedWeights(Attachment):
    """Restores masked weights after each step, where the mask's gradient is `masked`.

    Args:
        model: the network.
        layers: the layers by name; each has a mask (`insert_masks`).
        terms: losses that a method adds.
        notes: messages for the user.

    Raises:
        InputError: a layer has no mask.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        *,
        terms: Sequence[LossTerm] = (),
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(model, terms, notes=notes)
        self.masked = dict(layers)
        for name, layer in self.masked.items():
            if weight_mask(layer) is None:
                raise InputError(f"the layer '{name}' has no mask. Call insert_masks(layers, gradient, method) first.")
        self._before_step: dict[str, Tensor] = {}

    @torch.no_grad()
    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Copy the weights."""
        for name, layer in self.masked.items():
            if mask_of(layer).gradient == "masked":
                self._before_step[name] = dense_weight(layer).detach().clone()

    @torch.no_grad()
    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Restore masked weights, which momentum and weight decay have moved."""
        super().after_step(step, optimizer)
        for name, weight in self._before_step.items():
            dense = dense_weight(self.masked[name])
            dense.copy_(torch.where(mask_of(self.masked[name]).mask, dense, weight))
        self._before_step.clear()


class MaskedAttachment(FrozenMaskedWeights):
    """Masks that a method updates.

    Args:
        updates: approximate number of mask updates; the other arguments as in `FrozenMaskedWeights`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        *,
        updates: int = 1,
        terms: Sequence[LossTerm] = (),
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(model, layers, terms=terms, notes=notes)
        self.log = MaskLog()
        self.log_interval = log_interval(updates)
        self.total = sum(mask_of(layer).mask.numel() for layer in self.masked.values())

    @property
    def metrics(self) -> dict[str, Any]:
        """`masks`, a list with one mask log: `steps`, `sparsity` and `changed`."""
        return {"masks": [self.log.columns]}

    @property
    def changes(self) -> Sequence[tuple[int, float]]:
        """The logged updates of the masks."""
        return self.log.changes

    def state_dict(self) -> dict[str, Tensor]:
        """The mask log."""
        return {"mask_log": self.log.rows}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the mask log."""
        self.log.load(state["mask_log"])

    @property
    def sparsity(self) -> float:
        """Fraction of the layers' weights that is masked."""
        return 1 - sum(int(mask_of(layer).mask.sum()) for layer in self.masked.values()) / self.total

    @torch.no_grad()
    def set_masks(self, new_masks: Mapping[str, Tensor], step: int, number: int = 0) -> None:
        """Set the masks of some layers; all processes get those of rank 0.

        Args:
            new_masks: layer -> bool (C_out, ...).
            step: number of completed steps.
            number: number of the update; only some updates are logged.

        Raises:
            InputError: a layer is not masked here, or a mask has another shape or data type.
        """
        for name, mask in new_masks.items():
            if name not in self.masked:
                raise unknown("masked layer", name, self.masked)
            shape = mask_of(self.masked[name]).mask.shape
            if mask.dtype != torch.bool or mask.shape != shape:
                given = f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}"
                raise InputError(f"the mask of layer '{name}' must be bool of shape {tuple(shape)}, got {given}.")
        changed = sum(int((mask_of(self.masked[name]).mask != mask).sum()) for name, mask in new_masks.items())
        for name, mask in new_masks.items():
            mask_of(self.masked[name]).mask.copy_(mask)
        if number % self.log_interval == 0:
            self.log.add(step, self.sparsity, changed / self.total)
        broadcast_from_rank0(nn.ModuleList(mask_of(layer) for layer in self.masked.values()))

    def finish(self) -> None:
        """Fix the masks: masked weights have no gradient from here on.

        Warns:
            CompressionWarning: no mask was set.
        """
        super().finish()
        if not (self.scheduled_steps or len(self.log.rows) or self.sparsity):
            remedy = (
                "Call set_masks, for example in begin."
                if self.completed
                else "In your own loop, call bind(optimizer) before the first step."
            )
            warnings.warn(
                f"{type(self).__name__}: finish was called after {self.completed} optimizer steps, and no mask was "
                f"set: the sparsity is 0. {remedy}",
                CompressionWarning,
                stacklevel=2,
            )
        for layer in self.masked.values():
            mask_of(layer).gradient = "masked"
