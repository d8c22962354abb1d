"""RigL: sparse training at constant sparsity; weights are dropped by magnitude and grown by gradient.

Evci, Gale, Menick, Castro and Elsen, "Rigging the Lottery: Making All Tickets Winners", ICML 2020 (arXiv 1911.11134).

    s_l      sparsity of layer l with a weight w (C_out, C_in, k, k); the sparsity over all layers together is exact
             erk: 1 - s_l ~ (C_out + C_in + k + k) / (C_out * C_in * k * k), at most 1; uniform: the same in all
    alpha_t  = drop_fraction / 2 * (1 + cos(pi * t / t_end)), every 100 steps until t_end, a fraction of the stage
    drop     of the n active weights of a layer, the int(alpha_t * n) smallest by |w|
    grow     the same number of inactive weights: those with the largest |dL/dw_hat|; they start at zero

Between updates, masked weights have no gradient and do not move. As in the authors' code, a weight that was just
dropped may be grown again and then keeps its value, and the momentum of grown weights is set to zero.

The paper starts from a random network with random masks. Here the given network, usually a trained one, keeps the
largest weights of each layer. The authors' code skips the optimizer step when it updates masks; here the step is taken
first, and its gradient decides the growth. The paper's uniform sparsities leave the first layer dense; here it is
masked too. As in the other methods, fully connected layers are masked only if `layers` names them or there is no
convolution. `clip_norm` applies to the dense gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.core.plain_values import plain_dataclass
from tersor.graph.layer_selection import Layer, prunable
from tersor.pruning.topk import top_k_mask
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext, require_steps
from tersor.training.mask_attachment import (
    MaskedAttachment,
    MaskedLayers,
    dense_weight,
    insert_masks,
    mask_of,
)
from tersor.training.method import PLAIN_VALUES
from tersor.training.schedule import interpolate

Distribution = Literal["erk", "uniform"]


def layer_counts(shapes: Mapping[str, torch.Size], sparsity: float, distribution: Distribution) -> dict[str, int]:
    """The number of active weights of each layer: at least one, and together exactly 1 - `sparsity` of all.

    Args:
        shapes: layer -> (C_out, C_in, ...).
        sparsity: the sparsity of all layers together.
        distribution: "erk" or "uniform".
    """
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    total = sum(sizes.values())
    target = max(len(sizes), total - round(sparsity * total))
    weight = {name: float(sum(shape) if distribution == "erk" else sizes[name]) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:  # layers with a density above 1 are dense, and the others share the rest
        free = target - sum(sizes[name] for name in dense)
        share = free / max(sum(weight[name] for name in sizes if name not in dense), 1e-12)
        full = {name for name in sizes if name not in dense and share * weight[name] > sizes[name]}
        if not full:
            break
        dense |= full
    exact = {name: float(sizes[name]) if name in dense else max(1.0, share * weight[name]) for name in sizes}
    counts = {name: int(value) for name, value in exact.items()}
    by_rest = sorted(sizes, key=lambda name: counts[name] - exact[name])
    left = target - sum(counts.values())
    while left:  # largest remainders first; weights of the minimum of one are taken from the largest layers
        for name in by_rest if left > 0 else sorted(sizes, key=lambda name: -counts[name]):
            step = (left > 0) - (left < 0)
            if left and 1 <= counts[name] + step <= sizes[name]:
                counts[name] += step
                left -= step
    return counts


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class RigL:
    """Train at constant sparsity: drop the smallest weights and activate those with the largest gradients."""

    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"sparsity": 0.6, "distribution": "uniform", "every": 2, "drop_fraction": 0.4}
    off: ClassVar[dict[str, Any]] = {"sparsity": 0.0}

    sparsity: Annotated[float, Field(ge=0, lt=1, description="fraction of masked weights")] = 0.9
    distribution: Annotated[
        Distribution,
        Field(description="erk (Erdős-Rényi kernel): small layers are denser; uniform: the same in all layers"),
    ] = "erk"
    drop_fraction: Annotated[
        float, Field(ge=0, lt=1, description="alpha: fraction of a layer's active weights that is replaced at first")
    ] = 0.3
    every: Annotated[int, Field(ge=1, description="steps between two mask updates")] = 100
    end: Annotated[float, Field(gt=0, le=1, description="fraction of the stage after which masks are fixed")] = 0.75
    layers: MaskedLayers = ()

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Insert masks, which `begin` sets.

        Raises:
            InputError: no steps, a pattern that matches nothing, a quantized weight.
        """
        layers = prunable(model, self.layers)
        if not self.sparsity:
            return Attachment(model)
        require_steps(context, "rigl")
        insert_masks(layers, "straight_through", "rigl")
        return RigLAttachment(self, model, layers, context.steps)


class RigLAttachment(MaskedAttachment):
    """Masks with a constant number of active weights per layer."""

    def __init__(self, method: RigL, model: nn.Module, layers: dict[str, Layer], steps: int) -> None:
        super().__init__(model, layers, updates=steps // method.every)
        self.method = method
        self.scheduled_steps = steps
        self.until = max(1, round(method.end * steps))
        self.growth: dict[str, Tensor] = {}

    @torch.no_grad()
    def begin(self) -> None:
        """Keep the largest weights of each layer."""
        shapes = {name: dense_weight(layer).shape for name, layer in self.masked.items()}
        counts = layer_counts(shapes, self.method.sparsity, self.method.distribution)
        largest = {name: top_k_mask(dense_weight(layer).abs(), counts[name]) for name, layer in self.masked.items()}
        self.set_masks(largest, 0)

    @torch.no_grad()
    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Keep the dense gradient for the growth, and mask it."""
        self.growth = {}
        for name, layer in self.masked.items():
            dense, mask = dense_weight(layer), mask_of(layer).mask
            self._before_step[name] = dense.detach().clone()
            if dense.grad is not None:
                if self._due(step):
                    self.growth[name] = dense.grad.abs()
                dense.grad.mul_(mask)

    @torch.no_grad()
    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Drop and grow, every few steps."""
        super().after_step(step, optimizer)
        if not self._due(step):
            return
        done = step + 1
        fraction = interpolate("cosine", done / self.until, self.method.drop_fraction, 0.0)
        updated = {name: self._update(name, gradient, fraction, optimizer) for name, gradient in self.growth.items()}
        self.set_masks(updated, done, done // self.method.every)
        self.growth = {}

    def _due(self, step: int) -> bool:
        return (step + 1) % self.method.every == 0 and step + 1 < self.until

    def _update(self, name: str, gradient: Tensor, fraction: float, optimizer: Optimizer) -> Tensor:
        """The layer's new mask; grown weights and their optimizer state are set to zero."""
        dense, mask = dense_weight(self.masked[name]), mask_of(self.masked[name]).mask
        active = int(mask.sum())
        count = math.floor(active * fraction)
        kept = top_k_mask(dense.abs().masked_fill(~mask, -torch.inf), active - count)
        updated = kept | top_k_mask(gradient.masked_fill(kept, -torch.inf), count)
        new = updated & ~mask
        dense.masked_fill_(new, 0.0)
        for value in optimizer.state.get(dense, {}).values():
            if isinstance(value, Tensor) and value.shape == dense.shape:
                value.masked_fill_(new, 0.0)
        return updated
