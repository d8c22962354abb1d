"""RigL: a network that is sparse from its first step to its last, and whose masks look for better places meanwhile.

Evci, Gale, Menick, Castro and Elsen, "Rigging the Lottery: Making All Tickets Winners", ICML 2020 (arXiv 1911.11134).

    s_l      sparsity of layer l with a weight w (C_out, C_in, k, k); all together are exactly as sparse as asked
             erk: 1 - s_l ~ (C_out + C_in + k + k) / (C_out * C_in * k * k), at most 1; uniform: the same in all
    alpha_t  = drop_fraction / 2 * (1 + cos(pi * t / t_end)), every 100 steps until t_end, a fraction of the stage
    drop     of the n weights of a layer that are there, the int(alpha_t * n) smallest by |w|
    grow     as many of what is not there, by the largest |dL/dw_hat| of the dense gradient, from zero

In between, what is masked gets no gradient and does not move. As in the authors' code, what was just dropped may grow
again and then keeps its value, and the optimizer's memory of grown weights (momentum) is set to zero.

The paper starts from a random network with random masks. Here the given network, mostly a trained one, keeps the
largest weights of each layer. The authors' code renews masks in the place of a step; here the step is taken first, and
its gradient is that of the growth. The paper's uniform sparsities leave the first layer dense; here no layer is left
out, so that all methods mean the same by a sparsity. A `clip_norm` sees the dense gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.graph.layer_selection import Layer, prunable
from tersor.pruning.topk import best_of
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.mask_attachment import MaskedAttachment, check_steps, dense_of, lay_masks, mask_of
from tersor.training.method import PLAIN_VALUES
from tersor.training.schedule import interpolate

Distribution = Literal["erk", "uniform"]


def layer_counts(shapes: Mapping[str, torch.Size], sparsity: float, distribution: Distribution) -> dict[str, int]:
    """How many weights of each layer stay: at least one, and together exactly 1 - `sparsity` of all.

    Args:
        shapes: layer -> (C_out, C_in, ...).
        sparsity: of all together.
        distribution: "erk" or "uniform".
    """
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    wanted = sum(sizes.values()) - round(sparsity * sum(sizes.values()))
    weight = {name: float(sum(shape) if distribution == "erk" else sizes[name]) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:  # what would be denser than dense is dense, and the others share what is left
        free = wanted - sum(sizes[name] for name in dense)
        share = free / max(sum(weight[name] for name in sizes if name not in dense), 1e-12)
        full = {name for name in sizes if name not in dense and share * weight[name] > sizes[name]}
        if not full:
            break
        dense |= full
    exact = {name: float(sizes[name]) if name in dense else max(1.0, share * weight[name]) for name in sizes}
    counts = {name: int(value) for name, value in exact.items()}
    by_rest = sorted(sizes, key=lambda name: counts[name] - exact[name])
    left = wanted - sum(counts.values())
    while left:  # the largest remainders first; where every layer has its one weight, the largest layers give
        for name in by_rest if left > 0 else sorted(sizes, key=lambda name: -counts[name]):
            step = (left > 0) - (left < 0)
            if left and 1 <= counts[name] + step <= sizes[name]:
                counts[name] += step
                left -= step
        if all(count == 1 for count in counts.values()) and left < 0:
            break
    return counts


@dataclass(frozen=True, config=PLAIN_VALUES)
class RigL:
    """Sparse from the first step: the smallest weights go, and those that the loss asks for most come."""

    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"sparsity": 0.6, "distribution": "uniform", "every": 2, "drop_fraction": 0.4}
    off: ClassVar[dict[str, Any]] = {"sparsity": 0.0}

    sparsity: Annotated[float, Field(ge=0, lt=1, description="fraction of the weights that is masked")] = 0.9
    distribution: Annotated[
        Distribution, Field(description="erk: small layers are denser; uniform: all are as sparse")
    ] = "erk"
    drop_fraction: Annotated[
        float, Field(ge=0, lt=1, description="alpha: of a layer's weights that change places, at first")
    ] = 0.3
    every: Annotated[int, Field(ge=1, description="steps between two changes")] = 100
    end: Annotated[float, Field(gt=0, le=1, description="fraction of the stage after which masks stay")] = 0.75
    layers: Annotated[
        tuple[str, ...],
        Field(description="patterns; all convolutions if left, or all fully connected layers where there are none"),
    ] = ()

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Lays a mask on every chosen weight, which `begin` sets.

        Raises:
            InputError: no steps, a pattern that matches nothing, a weight on a grid already.
        """
        layers = prunable(model, self.layers)
        if not self.sparsity:
            return Attachment(model)
        check_steps(context.steps, "rigl")
        lay_masks(layers, "all", "rigl")
        return RigLAttachment(self, model, layers, context.steps)


class RigLAttachment(MaskedAttachment):
    """Masks of fixed sizes whose places change."""

    def __init__(self, method: RigL, model: nn.Module, layers: dict[str, Layer], steps: int) -> None:
        super().__init__(model, layers, remaskings=steps // method.every)
        self.method = method
        self.until = max(1, round(method.end * steps))
        self.wished: dict[str, Tensor] = {}

    @torch.no_grad()
    def begin(self) -> None:
        """The largest weights of each layer stay."""
        shapes = {name: dense_of(layer).shape for name, layer in self.masked.items()}
        counts = layer_counts(shapes, self.method.sparsity, self.method.distribution)
        found = {name: best_of(dense_of(layer).abs(), counts[name]) for name, layer in self.masked.items()}
        self.set_masks(found, 0)

    @torch.no_grad()
    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """The dense gradient is looked at, and only that of what is there moves it."""
        self.wished = {}
        for name, layer in self.masked.items():
            dense, mask = dense_of(layer), mask_of(layer).mask
            self._held[name] = dense.detach().clone()
            if dense.grad is not None:
                if self._due(step):
                    self.wished[name] = dense.grad.abs()
                dense.grad.mul_(mask)

    @torch.no_grad()
    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Drops and grows, every few steps."""
        super().after_step(step, optimizer)
        if not self._due(step):
            return
        done = step + 1
        fraction = interpolate("cosine", done / self.until, self.method.drop_fraction, 0.0)
        found = {name: self._moved(name, gradient, fraction, optimizer) for name, gradient in self.wished.items()}
        self.set_masks(found, done, done // self.method.every)
        self.wished = {}

    def _due(self, step: int) -> bool:
        return (step + 1) % self.method.every == 0 and step + 1 < self.until

    def _moved(self, name: str, gradient: Tensor, fraction: float, optimizer: Optimizer) -> Tensor:
        """The layer's new mask; what has come begins at zero, also in the optimizer's memory."""
        dense, mask = dense_of(self.masked[name]), mask_of(self.masked[name]).mask
        there = int(mask.sum())
        count = math.floor(there * fraction)
        stays = best_of(dense.abs().masked_fill(~mask, -torch.inf), there - count)
        found = stays | best_of(gradient.masked_fill(stays, -torch.inf), count)
        new = found & ~mask
        dense.masked_fill_(new, 0.0)
        for value in optimizer.state.get(dense, {}).values():
            if isinstance(value, Tensor) and value.shape == dense.shape:
                value.masked_fill_(new, 0.0)
        return found
