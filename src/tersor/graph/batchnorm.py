"""BatchNorm with statistics that can be frozen during training, which the `state_dict` records.

In eval mode a BatchNorm normalizes by its running statistics, but training calls `train()` on the whole network, also
when a run resumes. A `Freezable` BatchNorm stays in eval mode once it is frozen.
"""

from __future__ import annotations

from functools import cache
from typing import cast

import torch
from torch import Tensor, nn

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def gamma_and_beta(norm: Norm) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """Scale and shift of each channel, (C,), or None."""
    return cast("nn.Parameter | None", norm.weight), cast("nn.Parameter | None", norm.bias)


class Freezable(nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
    """First base of the classes of `freezable_class`; the forward method is that of the second base."""

    frozen = False

    def train(self, mode: bool = True) -> Freezable:
        """Training mode, unless frozen; gamma and beta are trained in either case."""
        return super().train(mode and not self.frozen)

    def freeze(self) -> None:
        """Normalize by the running statistics from now on, and stop updating them."""
        self.frozen = True
        self.eval()

    def get_extra_state(self) -> Tensor:
        """Whether it is frozen."""
        return torch.tensor(self.frozen)

    def set_extra_state(self, state: Tensor) -> None:
        """Restores what `get_extra_state` returned."""
        self.frozen = bool(state)
        self.train(self.training)


@cache
def freezable_class(kind: type[Norm]) -> type[Freezable]:
    """A freezable class with the forward method of `kind`."""
    return type(f"Freezable{kind.__name__}", (Freezable, kind), {})


def freezable(norm: Norm) -> Freezable:
    """A freezable BatchNorm with the forward method, the Parameter objects and the buffers of `norm`."""
    if isinstance(norm, Freezable):
        return norm
    kind = freezable_class(type(norm))
    made = kind.__new__(kind)
    made.__dict__.update(vars(norm))
    return made


def make_freezable(model: nn.Module) -> tuple[Freezable, ...]:
    """Replaces all BatchNorms of `model` that have running statistics by freezable ones, and returns these."""
    found = {name: each for name, each in model.named_modules() if isinstance(each, Norm)}
    for name, norm in found.items():
        if norm.running_mean is not None:
            model.set_submodule(name, freezable(norm))
    return tuple(each for each in model.modules() if isinstance(each, Freezable))


class FrozenAt:
    """Freezes every BatchNorm of a network after a fraction of a stage.

    Args:
        model: the network; its BatchNorms are replaced by freezable ones.
        fraction: fraction of the stage, 0 to 1; 1 never freezes.
        steps: number of steps of the stage.
    """

    def __init__(self, model: nn.Module, fraction: float, steps: int) -> None:
        self._norms = make_freezable(model) if fraction < 1 else ()
        self._after = round(fraction * steps)

    def done(self, steps: int) -> None:
        """Called after `steps` steps."""
        for norm in self._norms if steps == self._after else ():
            norm.freeze()
