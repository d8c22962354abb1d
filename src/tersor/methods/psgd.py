"""Position-based scaled gradient: training in full precision that leaves weights where a grid will find them.

Kim, Yoo and Kwak, "Position-based Scaled Gradient for Model Quantization and Pruning", NeurIPS 2020 (arXiv 2005.11035).

    w       (C, ...)            a weight of a layer, C output channels
    d(w)    = |w - w_hat|       w_hat: the nearest point of the target, a grid of b bits, or zero: the weight itself
    dL/dw  <- dL/dw * s(w)      s = lambda * d(w): far from its point a weight moves much, on it not at all
    lambda  = strength, or what makes the mean of s over all weights `mean_scale` as the stage begins

lambda stays as it is, as in the paper, so that s falls as weights come to their points, and they settle there. If it
rose to keep the mean, the last weights on their way would be thrown about.

The forward sees full precision, whatever is remembered of the ranges, but where a method behind it in the same stage
rounds; afterwards `ptq` with as many bits rounds weights that lie near their points already. The bits have to be known
in advance. Toward zero it is sparse training: one threshold (`weight_pruning`, one_shot) then removes what gathered
there. The gradient is scaled around the optimizer's step: weight decay stays outside, and momentum gathers scaled
gradients.

`scale_by: constant` is the control: the same mean scale, whatever the position. What is left of the method's gain
beside it is more than a larger learning rate.

The paper has s = lambda * (d + epsilon), its code no epsilon: a weight on its point does not move. So here. The code's
lambda of 150 is a mean scale of 4.0 at 4 bits and of 15.4 at 2 (on its own network), hence `mean_scale`. Its grid is
one for a whole layer and over a running mean of the largest weight; `per_channel: false` and `range: running` are that.
By default the grid is the one of `ptq` with the same `first_last_bits` and `weight_range: minmax`; by default `ptq`
clips below 8 bits, where a network has BatchNorm. Of fewer than 4 bits, the first and the last layer aim at 8, as in
the code, and as `ptq` has them by default at any width. The code also trains 2 bits without weight decay (write
`optimizer: {weight_decay: 0}`), and aims the classifier's bias at a grid of its own. Here biases are free: they run in
32 bits.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from tersor.core.errors import InputError
from tersor.graph.layer_selection import Layer, matching, weighted_layers
from tersor.graph.parametrization import parametrizations_of, parametrized
from tersor.quantization.fake_quantize import FakeQuantize, RunningLargest
from tersor.quantization.grid import Grid
from tersor.quantization.grid_distance import Laid, around_zero, drawn, on_grid
from tersor.quantization.observers import channel_maxima
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.method import PLAIN_VALUES

_ENDS_BITS = 8


def distance(weight: Tensor, largest: Tensor, grid: Grid) -> Tensor:
    """How far each of `weight` (C, ...) is from the nearest point of a grid.

    Args:
        weight: of a layer.
        largest: what the grid's last point is, () or (C,).
        grid: its integers.
    """
    return on_grid(weight, largest, grid).distances


@dataclass(frozen=True, config=PLAIN_VALUES)
class PSGD:
    """Gradients scaled by each weight's distance to the point that it will be rounded to."""

    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"bits": 2, "range": "running", "per_channel": False, "strength": 20.0}
    off: ClassVar[dict[str, Any]] = {"scale_by": "constant", "mean_scale": 1.0}

    bits: Annotated[int, Field(ge=2, le=8, description="of the grid that weights are drawn to")] = 4
    target: Annotated[Literal["grid", "zero"], Field(description="what weights are drawn to")] = "grid"
    per_channel: Annotated[bool, Field(description="a grid for each output channel, or one for the layer")] = True
    range: Annotated[
        Literal["exact", "running"], Field(description="the largest weight that is, or a running mean of it")
    ] = "exact"
    mean_scale: Annotated[
        float, Field(gt=0, description="mean factor on the first gradients, where strength is left")
    ] = 2.0
    strength: Annotated[float | None, Field(gt=0, description="lambda, in place of mean_scale")] = None
    scale_by: Annotated[
        Literal["distance", "constant"], Field(description="constant: the control, with the same mean scale")
    ] = "distance"
    layers: Annotated[tuple[str, ...], Field(description="patterns; all convolutions and linear layers if left")] = ()

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Chooses the layers; lays what remembers a running range where one is asked for.

        Raises:
            InputError: a pattern that matches nothing, no layer, a weight that lies on a grid already, or that was
                drawn to another kind of grid before.
        """
        everything = weighted_layers(model)
        chosen = matching(self.layers, everything) if self.layers else set(everything)
        if not chosen:
            raise InputError(f"{type(model).__name__} has no convolution and no fully connected layer for psgd.")
        for name in chosen:
            if any(isinstance(each, FakeQuantize) for each in parametrizations_of(everything[name])):
                raise InputError(f"the weight of {name} is on a grid already. Write psgd before ptq and qat.")
        ends = {next(iter(everything)), list(everything)[-1]} if self.bits < 4 else set[str]()
        aims = {name: Grid.signed(_ENDS_BITS if name in ends else self.bits) for name in everything if name in chosen}
        if self.target == "grid" and self.range == "running":
            for name in aims:
                _track(name, everything[name], self.per_channel)
        return PSGDAttachment(self, model, {name: everything[name] for name in aims}, aims)


class PSGDAttachment(Attachment):
    """Scales the gradients before every step."""

    def __init__(self, method: PSGD, model: nn.Module, layers: dict[str, Layer], aims: dict[str, Grid]) -> None:
        super().__init__(model)
        self.method = method
        self.drawn = layers
        self.aims = aims
        # a stage that goes on attaches again, to the weights that it began with: so no checkpoint needs to hold them
        self._begun = {name: _original(layer).detach().clone() for name, layer in layers.items()}
        laid = [self._laid(name, weight, self._exact(weight)) for name, weight in self._begun.items()]
        mean = max(1e-12, float(_mean([each.distances for each in laid])))
        self._strength = method.mean_scale / mean if method.strength is None else method.strength
        # without a given strength it is mean_scale itself, and not a quotient of sums
        self._constant = method.mean_scale if method.strength is None else method.strength * mean

    @property
    def metrics(self) -> dict[str, Any]:
        """`mean_distance` of all weights to their points, as large as weights are; and `drawn`: to which `target`,
        `scale_by` what, and what came of it (see `tersor.quantization.grid_distance.drawn`).
        """
        now = {name: _original(layer).detach() for name, layer in self.drawn.items()}
        # a method that was laid later may have removed channels: then nobody knows which weight was which
        begun = {name: each.to(now[name].device) for name, each in self._begun.items() if each.shape == now[name].shape}
        found: dict[str, Any] = {"mean_distance": float(_mean([*self._distances().values()]))}
        if begun:
            before = {name: self._laid(name, weight, self._exact(weight)) for name, weight in begun.items()}
            after = {name: self._laid(name, now[name], self._largest(name, now[name])) for name in begun}
            way = {"target": self.method.target, "scale_by": self.method.scale_by}
            found["drawn"] = way | drawn(before, after)
        return found

    @torch.no_grad()
    def before_step(self, step: int, optimizer: Optimizer) -> None:
        """The gradients are those of the whole step, averaged over processes."""
        for layer in self.drawn.values():
            tracker = _tracker(layer)
            if tracker is not None:
                tracker.follow(_original(layer), first=step == 0)
        for name, layer in self.drawn.items():
            gradient = _original(layer).grad
            if gradient is None:
                continue
            if self.method.scale_by == "constant":
                gradient.mul_(self._constant)
            else:
                gradient.mul_(self._distance(name, _original(layer).detach()).mul_(self._strength))

    @torch.no_grad()
    def _distances(self) -> dict[str, Tensor]:
        return {name: self._distance(name, _original(layer).detach()) for name, layer in self.drawn.items()}

    def _distance(self, name: str, weight: Tensor) -> Tensor:
        if self.method.target == "zero":
            return weight.abs()
        return distance(weight, self._largest(name, weight), self.aims[name])

    def _laid(self, name: str, weight: Tensor, largest: Tensor) -> Laid:
        return around_zero(weight) if self.method.target == "zero" else on_grid(weight, largest, self.aims[name])

    def _largest(self, name: str, weight: Tensor) -> Tensor:
        tracker = _tracker(self.drawn[name])
        return self._exact(weight) if tracker is None else tracker.largest

    def _exact(self, weight: Tensor) -> Tensor:
        """Of the weights that are; also where a running mean begins."""
        if self.method.per_channel:
            return channel_maxima(weight)
        low, high = weight.aminmax()
        return torch.maximum(-low, high)


def _mean(distances: list[Tensor]) -> Tensor:
    """Over all weights, ()."""
    return torch.cat([each.flatten() for each in distances]).mean()


def _original(layer: Layer) -> Tensor:
    """The Parameter, whatever is laid on it."""
    weight = parametrized(layer).original if parametrize.is_parametrized(layer, "weight") else layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _track(name: str, layer: Layer, per_channel: bool) -> None:
    known = _tracker(layer)
    if known is None:
        tracker = RunningLargest(len(layer.weight) if per_channel else None).to(layer.weight.device)
        parametrize.register_parametrization(layer, "weight", tracker)
    elif bool(known.largest.ndim) != per_channel:
        raise InputError(f"psgd drew {name} to another kind of grid before. Write the same per_channel as there.")


def _tracker(layer: Layer) -> RunningLargest | None:
    return next((each for each in parametrizations_of(layer) if isinstance(each, RunningLargest)), None)
