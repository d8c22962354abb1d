"""Group lasso: coupled channels are pulled to zero while the network trains, the least important ones hardest.

Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023. A stage with this comes before `channel_pruning`:
what has shrunk goes without being missed.

    W.grad += strength * gamma_c * W[c]            of every layer W (C_out, C_in, ...) that channel c has a part in:
                                                   its rows, its columns, its BatchNorm's factor
    gamma_c = 2^(alpha * (I_max - I_c) / (I_max - I_min))          from 1, the most important, to 2^alpha = 16
    I_c     = sqrt of the mean over the layers of ||W[c]||_2^2, of the group

The paper's regulariser is the sum of gamma_c * I_c with I_c = sum over the layers of ||W[c]||_2^2; the authors' code
(GroupNormPruner of torch-pruning), which is followed here, takes the root of I_c for gamma, and leaves the factor 2 of
the gradient to `strength`. Neither divides by the norm: despite its name it is a weighted L2, and no lasso. Biases are
left alone. Where all channels matter the same, the code's gamma is 0 / 0, and here 1. Its strength is 1e-4 by default,
and 5e-4 in the CIFAR runs of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as validated
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.core.errors import InputError
from tersor.data.batch import images_of
from tersor.graph.capture import capture
from tersor.pruning.channel_importance import Part, norms, parts
from tersor.pruning.channel_selection import removable
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.method import PLAIN_VALUES


def pull(importance: Tensor, alpha: float) -> Tensor:
    """gamma (channels,): 1 for the most important channel to 2^alpha for the least; 1 where all are alike."""
    spread = importance.max() - importance.min()
    return 2 ** (alpha * (importance.max() - importance) / spread) if spread > 0 else torch.ones_like(importance)


@validated(frozen=True, config=PLAIN_VALUES)
class GroupLasso:
    """Sparse training of channels, before their removal."""

    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"strength": 0.01, "alpha": 2.0}
    off: ClassVar[dict[str, Any]] = {"strength": 0.0}

    strength: Annotated[float, Field(ge=0, description="of the pull, beside the loss's gradient")] = 5e-4
    alpha: Annotated[float, Field(ge=0, description="the least important is pulled 2^alpha times as hard")] = 4.0
    exclude: Annotated[tuple[str, ...], Field(description="patterns of layers whose channels are left alone")] = ()

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Finds the coupled channels; the network stays as it is.

        Raises:
            InputError: no data, masks or grids on the network, a network whose channels cannot be followed.
        """
        first = next(iter(context.data), None) if context.data is not None else None
        if first is None:
            raise InputError("group_lasso needs images to run the network on; none were given. Pass data=...")
        graph = capture(model)
        groups, whole = removable(graph, images_of(first)[:1], self.exclude, "group_lasso")
        found = [_Group(len(group.slices), parts(graph, group)) for group in groups]
        notes = [f"left alone: the channels of {root}, since {why}" for root, why in whole.items()]
        return GroupLassoAttachment(self, model, found, notes)


@dataclass(frozen=True)
class _Group:
    """How many channels there are, and what they own of every weight. These are held as Parameters: a mask that is laid
    later stands before them.
    """

    channels: int
    parts: Sequence[Part]

    def importance(self) -> Tensor:
        """I (channels,) as the weights are now."""
        energies = [part.summed(norms(part.rows(part.weight.detach()), 2), self.channels) for part in self.parts]
        return torch.stack(energies).mean(0).sqrt()


class GroupLassoAttachment(Attachment):
    """Gradients that a pull to zero is added to."""

    holds_shapes = True

    def __init__(self, method: GroupLasso, model: nn.Module, groups: Sequence[_Group], notes: Sequence[str]) -> None:
        super().__init__(model, notes=notes)
        self.method = method
        self.groups = groups

    @torch.no_grad()
    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Adds strength * gamma * w to the gradients; a weight without one is left."""
        if not self.method.strength:
            return
        for group in self.groups:
            gamma = self.method.strength * pull(group.importance(), self.method.alpha)
            for part in group.parts:
                if part.weight.grad is not None:
                    part.weight.grad += part.spread(gamma) * part.weight
