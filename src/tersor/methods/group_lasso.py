"""Group lasso: sparse training with weight decay on coupled channels, strongest on the least important ones.

Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023. Use it in a stage before `channel_pruning`, which
then removes channels that are almost zero.

    W.grad += strength * gamma_c * W[c]            for every layer W (C_out, C_in, ...) with slices of channel c:
                                                   rows, columns, the scale of a BatchNorm
    gamma_c = 2^(alpha * (I_max - I_c) / (I_max - I_min))          from 1, the most important, to 2^alpha = 16
    I_c     = sqrt of the mean over the layers of the group of ||W[c]||_2^2

The paper's regularizer is the sum of gamma_c * I_c with I_c = sum over the layers of ||W[c]||_2^2. The authors' code
(GroupNormPruner of torch-pruning), which this file follows, takes the root of I_c for gamma, and includes the factor 2
of the gradient in `strength`. Neither divides by the norm: despite its name it is a weighted L2 penalty, not a lasso.
Biases are not decayed. If all channels are equally important, the code's gamma is 0 / 0, here 1. The code's default
strength is 1e-4; the paper's CIFAR runs use 5e-4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.core.plain_values import plain_dataclass
from tersor.data.batch import first_batch
from tersor.graph.capture import capture
from tersor.pruning.channel_importance import WeightSlice, row_norms, weight_slices
from tersor.pruning.channel_selection import removable_groups
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.method import PLAIN_VALUES


def decay_factors(importance: Tensor, alpha: float) -> Tensor:
    """gamma (channels,): 1 for the most important channel, 2^alpha for the least; 1 if all are equal."""
    spread = importance.max() - importance.min()
    return 2 ** (alpha * (importance.max() - importance) / spread) if spread > 0 else torch.ones_like(importance)


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class GroupLasso:
    """Decay unimportant coupled channels during training, before their removal."""

    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"strength": 0.01, "alpha": 2.0}
    off: ClassVar[dict[str, Any]] = {"strength": 0.0}

    strength: Annotated[float, Field(ge=0, description="coefficient of the decay that is added to the gradient")] = 5e-4
    alpha: Annotated[float, Field(ge=0, description="exponent: the fastest decay is 2^alpha times the slowest")] = 4.0
    exclude: Annotated[tuple[str, ...], Field(description="patterns of layers whose channels are not decayed")] = ()

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Find the coupled channels; the network is not changed.

        Raises:
            InputError: no data, a masked or quantized network, or one without removable channels.
        """
        images = first_batch(context.data, "group_lasso")
        graph = capture(model, images)
        groups, unprunable = removable_groups(graph, images[:1], self.exclude, "group_lasso")
        decayed = [_Group(len(group.slices), weight_slices(graph, group)) for group in groups]
        notes = [f"the channels of {root} are not decayed, since {reason}" for root, reason in unprunable.items()]
        return GroupLassoAttachment(self, model, decayed, notes)


@dataclass(frozen=True)
class _Group:
    """The number of channels, and their slices. They hold Parameters, so that a mask inserted later does not matter."""

    channels: int
    slices: Sequence[WeightSlice]

    def importance(self) -> Tensor:
        """I (channels,) of the current weights."""
        energies = [
            part.sum_by_channel(row_norms(part.rows(part.weight.detach()), 2), self.channels) for part in self.slices
        ]
        return torch.stack(energies).mean(0).sqrt()


class GroupLassoAttachment(Attachment):
    """Adds the decay to the gradients."""

    holds_shapes = True
    scheduled_steps = 1

    def __init__(self, method: GroupLasso, model: nn.Module, groups: Sequence[_Group], notes: Sequence[str]) -> None:
        super().__init__(model, notes=notes)
        self.method = method
        self.groups = groups

    @torch.no_grad()
    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Add strength * gamma * w to the gradients; weights without a gradient are not decayed."""
        if not self.method.strength:
            return
        for group in self.groups:
            gamma = self.method.strength * decay_factors(group.importance(), self.method.alpha)
            for part in group.slices:
                if part.weight.grad is not None:
                    part.weight.grad += part.expand(gamma) * part.weight
