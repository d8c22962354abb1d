"""What the methods that mask weights share: masks laid on layers, moved while a network trains, and what is told of it.

w (C_out, ...) is a weight, m its mask, m * w what is shown. Where the gradient of a mask is `kept`, a masked weight
does not move at all, in the stage of its method and in those behind: the optimizer's momentum and weight decay would
move it, so it is put back after every step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from tersor.core.distributed import broadcast_from_rank0
from tersor.core.errors import InputError
from tersor.graph.layer_selection import Layer
from tersor.graph.parametrization import parametrizations_of, parametrized
from tersor.pruning.mask import Gradient, Mask, weight_mask
from tersor.pruning.topk import masks
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.training.attachment import Attachment
from tersor.training.mask_log import MaskLog, log_interval
from tersor.training.objective import LossTerm
from tersor.training.schedule import interpolate


def check_floor(floor: float, sparsity: float) -> None:
    """Raises:
    InputError: the floor leaves too little to mask.
    """
    if floor > 1 - sparsity and not math.isclose(floor, 1 - sparsity):
        raise InputError(
            f"with a floor of {floor:g} at most {1 - floor:g} can be masked, and {sparsity:g} is asked. Write a "
            "lower floor or sparsity."
        )


def check_steps(steps: int, method: str) -> None:
    """Raises:
    InputError: there are no steps to move masks in.
    """
    if not steps:
        raise InputError(f"{method} moves masks while a network trains, and there are 0 steps. Write epochs or steps.")


def lay_masks(layers: Mapping[str, Layer], gradient: Gradient, method: str) -> None:
    """A mask on every weight, of ones where there was none before; all with this gradient.

    Raises:
        InputError: a weight lies on a grid already.
    """
    for name, layer in layers.items():
        if any(isinstance(each, FakeQuantize) for each in parametrizations_of(layer)):
            raise InputError(
                f"the weight of {name} is on a grid already, and masks lie under grids: zeros stay zeros only so. "
                f"Write {method} before ptq and qat."
            )
    for layer in layers.values():
        if weight_mask(layer) is None:
            mask = Mask(layer.weight.shape).to(layer.weight.device)
            parametrize.register_parametrization(layer, "weight", mask)
        mask_of(layer).gradient = gradient


def mask_of(layer: Layer) -> Mask:
    """The mask of a layer that has one."""
    mask = weight_mask(layer)
    assert mask is not None
    return mask


def dense_of(layer: Layer) -> nn.Parameter:
    """The Parameter under the mask, (C_out, ...)."""
    weight = parametrized(layer).original
    assert isinstance(weight, nn.Parameter)
    return weight


class KeptMasks(Attachment):
    """What lies under masks whose gradient is `kept` does not move.

    Args:
        model: the network.
        layers: by name; each has a mask (`lay_masks`).
        terms: losses that a method adds.
        notes: for the user.
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
        self._held: dict[str, Tensor] = {}

    @torch.no_grad()
    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Remembers the weights that masks keep from moving."""
        for name, layer in self.masked.items():
            if mask_of(layer).gradient == "kept":
                self._held[name] = dense_of(layer).detach().clone()

    @torch.no_grad()
    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Puts masked weights back: momentum and weight decay have moved them."""
        for name, weight in self._held.items():
            dense = dense_of(self.masked[name])
            dense.copy_(torch.where(mask_of(self.masked[name]).mask, dense, weight))
        self._held.clear()


class MaskedAttachment(KeptMasks):
    """Masks laid on layers, which a method moves.

    Args:
        remaskings: about how often the masks will be set; all else is that of `KeptMasks`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        *,
        remaskings: int = 1,
        terms: Sequence[LossTerm] = (),
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(model, layers, terms=terms, notes=notes)
        self.log = MaskLog()
        self.log_interval = log_interval(remaskings)
        self.total = sum(mask_of(layer).mask.numel() for layer in self.masked.values())

    @property
    def metrics(self) -> dict[str, Any]:
        """`masks`, a list with one mask log: `steps`, `sparsity` and `changed`."""
        return {"masks": [self.log.columns]}

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
    def set_masks(self, found: Mapping[str, Tensor], step: int, number: int = 0) -> None:
        """From now on these are the masks, of every layer or of some; in all processes those of the first.

        Args:
            found: layer -> bool (C_out, ...).
            step: how many steps are done.
            number: of this time among all; every few are logged.
        """
        changed = sum(int((mask_of(self.masked[name]).mask != mask).sum()) for name, mask in found.items())
        for name, mask in found.items():
            mask_of(self.masked[name]).mask.copy_(mask)
        if number % self.log_interval == 0:
            self.log.add(step, self.sparsity, changed / self.total)
        broadcast_from_rank0(nn.ModuleList(mask_of(layer) for layer in self.masked.values()))

    def finish(self) -> None:
        """Masks stand still from here on: what is masked gets no gradient any more."""
        for layer in self.masked.values():
            mask_of(layer).gradient = "kept"


class DynamicMasks(MaskedAttachment):
    """Masks of the largest dense weights of today, in the whole network together; what was masked may come back.

    The sparsity rises along a cubic, from what it is to what is asked, over the first part of the stage, and is fixed
    afterwards.

    Args:
        model: the network.
        layers: by name; each has a mask (`lay_masks`).
        sparsity: at the end.
        every: steps between two masks.
        end: fraction of the stage over which the sparsity rises.
        floor: fraction of each layer that always stays.
        steps: of the stage.
        terms: losses that the method adds.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        *,
        sparsity: float,
        every: int,
        end: float,
        floor: float,
        steps: int,
        terms: Sequence[LossTerm] = (),
    ) -> None:
        super().__init__(model, layers, remaskings=steps // every, terms=terms)
        self.wanted = sparsity
        self.every = every
        self.floor = floor
        self.steps = steps
        self.ramp = max(1, round(end * steps))
        self.start = self.sparsity

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Masks anew, every few steps until the end of the stage, and where the sparsity has come to its end."""
        super().after_step(step, optimizer)
        done = step + 1
        if done % self.every == 0 or done == self.ramp:
            progress = min(1.0, done / self.ramp)
            self._renew(interpolate("cubic", progress, self.start, self.wanted), done, done // self.every)

    def finish(self) -> None:
        """Lands on the exact sparsity, however few the steps were; masks that have it already are left alone."""
        if round(self.sparsity * self.total) != round(self.wanted * self.total):
            self._renew(self.wanted, self.steps, 0)
        super().finish()

    @torch.no_grad()
    def _renew(self, sparsity: float, done: int, number: int) -> None:
        scores = {name: dense_of(layer).detach().abs().flatten() for name, layer in self.masked.items()}
        shapes = {name: dense_of(layer).shape for name, layer in self.masked.items()}
        self.set_masks(masks(scores, shapes, sparsity, "global", self.floor), done, number)
