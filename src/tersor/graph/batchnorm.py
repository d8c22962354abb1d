"""BatchNorm whose statistics can be frozen while the network trains, and which remembers that they are.

In eval mode a BatchNorm normalises by its running statistics; but whoever trains calls `train()` on the whole network,
also when a run goes on. One of these stays in eval once it is frozen, and its `state_dict` says so.
"""

from __future__ import annotations

from functools import cache
from typing import cast

import torch
from torch import Tensor, nn

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def gamma_and_beta(norm: Norm) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """Factor and shift of each channel, (C,); each may be missing."""
    return cast("nn.Parameter | None", norm.weight), cast("nn.Parameter | None", norm.bias)


class Freezable(nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
    """Comes first among the bases of `freezable_class`; the forward is that of the class behind."""

    frozen = False

    def train(self, mode: bool = True) -> Freezable:
        """Training mode, unless it is frozen; gamma and beta learn on either way."""
        return super().train(mode and not self.frozen)

    def freeze(self) -> None:
        """From now on the running statistics normalise, and stay."""
        self.frozen = True
        self.eval()

    def get_extra_state(self) -> Tensor:
        """Whether it is frozen."""
        return torch.tensor(self.frozen)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes back what `get_extra_state` gave."""
        self.frozen = bool(state)
        self.train(self.training)


@cache
def freezable_class(kind: type[Norm]) -> type[Freezable]:
    """A class that computes what `kind` computes, also where that has a forward of its own, and can be frozen."""
    return type(f"Freezable{kind.__name__}", (Freezable, kind), {})


def freezable(norm: Norm) -> Freezable:
    """A BatchNorm that can be frozen, with the forward, the Parameter objects and the buffers of `norm`."""
    if isinstance(norm, Freezable):
        return norm
    kind = freezable_class(type(norm))
    made = kind.__new__(kind)
    made.__dict__.update(vars(norm))
    return made


def make_freezable(model: nn.Module) -> tuple[Freezable, ...]:
    """All BatchNorms of `model` with running statistics, each replaced by one that can be frozen."""
    found = {name: each for name, each in model.named_modules() if isinstance(each, Norm)}
    for name, norm in found.items():
        if norm.running_mean is not None:
            model.set_submodule(name, freezable(norm))
    return tuple(each for each in model.modules() if isinstance(each, Freezable))


class FrozenAt:
    """Freezes every BatchNorm of a network after so large a fraction of a stage; never, where that is all of it.

    Args:
        model: the network; its BatchNorms are replaced by ones that can be frozen.
        fraction: of the stage, 0 to 1.
        steps: of the stage.
    """

    def __init__(self, model: nn.Module, fraction: float, steps: int) -> None:
        self._norms = make_freezable(model) if fraction < 1 else ()
        self._after = round(fraction * steps)

    def done(self, steps: int) -> None:
        """So many steps are done."""
        for norm in self._norms if steps == self._after else ():
            norm.freeze()
