"""Position-based scaled gradient: full-precision training with smaller steps for weights near the points of a grid.

Kim, Yoo and Kwak, "Position-based Scaled Gradient for Model Quantization and Pruning", NeurIPS 2020 (arXiv 2005.11035).

    w       (C, ...)            weight of a layer with C output channels
    d(w)    = |w - w_hat|       w_hat: the nearest point of the target, a grid of b bits, or zero
    dL/dw  <- dL/dw * s(w)      s = lambda * d(w): the step grows with the distance from the point
    lambda  = strength, or the value for which the mean of s over all weights is `mean_scale` at the start

As in the paper, lambda is constant, so s falls as weights approach their points, and they settle there. If lambda
increased to keep the mean of s constant, weights that have not settled would overshoot.

The forward pass uses full precision, unless a later method of the same stage quantizes. Afterwards, `ptq` with the same
bits rounds weights that are already near their points; the bits must be known in advance. `target: zero` is sparse
training: one threshold (`weight_pruning`, one_shot) then removes the weights near zero. The gradient is scaled outside
the optimizer: weight decay is not scaled, and momentum accumulates scaled gradients.

`scale_by: constant` is the control: the same mean scale for all weights. If the method is better than this control, the
cause is not a larger learning rate.

The paper has s = lambda * (d + epsilon). Its code has no epsilon, so a weight on its point does not move; this file
follows the code. The code's lambda of 150 gives a mean scale of 4.0 at 4 bits and of 15.4 at 2 (on its own network);
this is the reason for `mean_scale`. Its grid is shared by a whole layer and reaches to a running mean of the largest
weight; here that is `per_channel: false` with `range: running`. By default the grid is that of `ptq` with
`weight_range: minmax` and, at 4 bits or more, `first_last_bits` equal to `bits`; note that `ptq` clips below 8 bits by
default if the network has BatchNorm. Below 4 bits, the first and last layer use the grid of 8 bits, as in the code, and
as in `ptq` by default. The code also trains without weight decay at 2 bits (write `optimizer: {weight_decay: 0}`), and
gives the classifier's bias a grid. Here biases have no grid, because they have 32 bits in the exported file.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from tersor.core.errors import InputError
from tersor.core.plain_values import plain_dataclass
from tersor.graph.layer_selection import Layer, matching, weighted_layers
from tersor.graph.parametrization import original_weight, parametrizations_of
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid
from tersor.quantization.grid_distance import WeightOnGrid, around_zero, drawn, on_grid
from tersor.quantization.observers import channel_maxima
from tersor.quantization.quantizer_options import PerChannel
from tersor.quantization.range_tracking import RunningLargest
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.method import PLAIN_VALUES

_FIRST_LAST_BITS = 8


def distance(weight: Tensor, largest: Tensor, grid: Grid) -> Tensor:
    """Distance of each weight to the nearest point of a grid.

    Args:
        weight: (C, ...), of a layer.
        largest: last point of the grid, () or (C,).
        grid: integers of the grid.
    """
    return on_grid(weight, largest, grid).distances


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class PSGD:
    """Scales gradients by each weight's distance to its nearest grid point, to prepare for quantization."""

    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"bits": 2, "range": "running", "per_channel": False, "strength": 20.0}
    off: ClassVar[dict[str, Any]] = {"scale_by": "constant", "mean_scale": 1.0}

    bits: Annotated[int, Field(ge=2, le=8, description="bits of the grid; steps are smaller near its points")] = 4
    target: Annotated[Literal["grid", "zero"], Field(description="target of the weights: grid points or zero")] = "grid"
    per_channel: PerChannel = True
    range: Annotated[
        Literal["exact", "running"], Field(description="range of the grid: the largest weight, or its running mean")
    ] = "exact"
    mean_scale: Annotated[
        float, Field(gt=0, description="mean gradient scale at the start, if strength is not set")
    ] = 2.0
    strength: Annotated[float | None, Field(gt=0, description="lambda, instead of mean_scale")] = None
    scale_by: Annotated[
        Literal["distance", "constant"],
        Field(description="distance: scale by the distance to the grid point; constant: same scale, as a control"),
    ] = "distance"
    layers: Annotated[
        tuple[str, ...], Field(description="patterns of layers; default: all convolutions and fully connected layers")
    ] = ()

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Chooses the layers, and tracks their running ranges if `range: running`.

        Raises:
            InputError: a pattern that matches nothing, no layer, a weight that is already quantized, or one for which
                an earlier stage of psgd tracks another kind of range.
        """
        everything = weighted_layers(model)
        chosen = matching(self.layers, everything) if self.layers else set(everything)
        if not chosen:
            raise InputError(f"{type(model).__name__} has no convolution and no fully connected layer for psgd.")
        for name in chosen:
            if any(isinstance(each, FakeQuantize) for each in parametrizations_of(everything[name])):
                raise InputError(f"the weight of {name} is already quantized. Write psgd before ptq and qat.")
        ends = {next(iter(everything)), list(everything)[-1]} if self.bits < 4 else set[str]()
        grids = {
            name: Grid.signed(_FIRST_LAST_BITS if name in ends else self.bits) for name in everything if name in chosen
        }
        if self.target == "grid" and self.range == "running":
            for name in grids:
                _track(name, everything[name], self.per_channel)
        return PSGDAttachment(self, model, {name: everything[name] for name in grids}, grids)


class PSGDAttachment(Attachment):
    """Scales the gradients before every step."""

    scheduled_steps = 1

    def __init__(self, method: PSGD, model: nn.Module, layers: dict[str, Layer], grids: dict[str, Grid]) -> None:
        super().__init__(model)
        self.method = method
        self.drawn = layers
        self.grids = grids
        # resuming attaches again to the initial weights, so a checkpoint need not contain them
        self._initial = {name: original_weight(layer).detach().clone() for name, layer in layers.items()}
        on_grids = [self._on_grid(name, weight, self._exact(weight)) for name, weight in self._initial.items()]
        mean = max(1e-12, float(_mean([each.distances for each in on_grids])))
        self._strength = method.mean_scale / mean if method.strength is None else method.strength
        # without strength it is exactly mean_scale, not a quotient of sums
        self._constant = method.mean_scale if method.strength is None else method.strength * mean

    @property
    def metrics(self) -> dict[str, Any]:
        """The `mean_distance` of all weights to their points, in the unit of the weights; and `drawn`: `target`,
        `scale_by`, and the summary of `tersor.quantization.grid_distance.drawn`.
        """
        now = {name: original_weight(layer).detach() for name, layer in self.drawn.items()}
        # after a later method has removed channels, the initial weights cannot be matched
        initial = {
            name: each.to(now[name].device) for name, each in self._initial.items() if each.shape == now[name].shape
        }
        metrics: dict[str, Any] = {"mean_distance": float(_mean([*self._distances().values()]))}
        if initial:
            before = {name: self._on_grid(name, weight, self._exact(weight)) for name, weight in initial.items()}
            after = {name: self._on_grid(name, now[name], self._largest(name, now[name])) for name in initial}
            options = {"target": self.method.target, "scale_by": self.method.scale_by}
            metrics["drawn"] = options | drawn(before, after)
        return metrics

    @torch.no_grad()
    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """Scales the gradients of the whole step, which are averaged over processes."""
        for layer in self.drawn.values():
            tracker = _tracker(layer)
            if tracker is not None:
                tracker.follow(original_weight(layer), first=step == 0)
        for name, layer in self.drawn.items():
            gradient = original_weight(layer).grad
            if gradient is None:
                continue
            if self.method.scale_by == "constant":
                gradient.mul_(self._constant)
            else:
                gradient.mul_(self._distance(name, original_weight(layer).detach()).mul_(self._strength))

    @torch.no_grad()
    def _distances(self) -> dict[str, Tensor]:
        return {name: self._distance(name, original_weight(layer).detach()) for name, layer in self.drawn.items()}

    def _distance(self, name: str, weight: Tensor) -> Tensor:
        if self.method.target == "zero":
            return weight.abs()
        return distance(weight, self._largest(name, weight), self.grids[name])

    def _on_grid(self, name: str, weight: Tensor, largest: Tensor) -> WeightOnGrid:
        return around_zero(weight) if self.method.target == "zero" else on_grid(weight, largest, self.grids[name])

    def _largest(self, name: str, weight: Tensor) -> Tensor:
        tracker = _tracker(self.drawn[name])
        return self._exact(weight) if tracker is None else tracker.largest

    def _exact(self, weight: Tensor) -> Tensor:
        """The current largest weights, where a running mean also starts."""
        if self.method.per_channel:
            return channel_maxima(weight)
        low, high = weight.aminmax()
        return torch.maximum(-low, high)


def _mean(distances: list[Tensor]) -> Tensor:
    """Mean over all weights, ()."""
    return torch.cat([each.flatten() for each in distances]).mean()


def _track(name: str, layer: Layer, per_channel: bool) -> None:
    tracked = _tracker(layer)
    if tracked is None:
        tracker = RunningLargest(len(layer.weight) if per_channel else None).to(layer.weight.device)
        parametrize.register_parametrization(layer, "weight", tracker)
    elif bool(tracked.largest.ndim) != per_channel:
        raise InputError(
            f"an earlier psgd stage used a different per_channel for {name}. Write the same per_channel in both stages."
        )


def _tracker(layer: Layer) -> RunningLargest | None:
    return next((each for each in parametrizations_of(layer) if isinstance(each, RunningLargest)), None)
