"""Rounding a network so that its parts answer as before: which weights go up and which down is learned, part by part.

    w_hat = s * (clip(floor(w / s) + h(v) + z, n, p) - z)         v of the shape of w, (C_out, ...)
    h(v)  = clip(1.2 sigmoid(v) - 0.1, 0, 1)                      rectified sigmoid: reaches 0 and 1
    loss  = mean over (N, H, W) of the sum over C of (y_hat - y)^2 + 0.01 sum of (1 - |2 h(v) - 1|^beta)

y is what the part gave in float, y_hat what it gives for the values that reach it now, through the parts before it,
which are rounded. The second term is off for the first fifth; then beta falls from 20 to 2 and drives every h to 0 or
1. In the end a weight lies on the point that it was rounded to: its quantizer then shows it as it is, and `state_dict`
tells which parts are done.

AdaRound, BRECQ and QDrop are this with other parts and other inputs: see their files in `methods/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from tersor.core.progress import NO_PROGRESS, ProgressReporter
from tersor.graph.layer_selection import Layer
from tersor.graph.parametrization import parametrization_input, parametrized
from tersor.pruning.mask import weight_mask
from tersor.quantization.blocks import Section, between, layer_sections, sections
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.quantizers import Quantizers

_BATCH = 32
_STRETCHED = (-0.1, 1.1)
_ROUNDING_WEIGHT = 0.01
_WARM_UP = 0.2
_SHARPEST, _SOFTEST = 2.0, 20.0
_ROUNDING_RATE = 1e-2
_STEP_RATE = 4e-4
_TOLD_EVERY = 50
_RUN_BATCH = 128


@dataclass(frozen=True)
class Reconstruction:
    """How a network is reconstructed.

    Attributes:
        whole_sections: section by section, or else layer by layer.
        learn_steps: whether the activations' steps are learned beside the rounding, on rounded activations; or else
            the rounding is learned on activations in float.
        drop: share of the activations that stay in float while both are learned, drawn anew in every iteration.
        iterations: for each part, of a batch of 32 images.
        seed: of what is drawn.
    """

    whole_sections: bool
    learn_steps: bool
    drop: float
    iterations: int
    seed: int


class _SoftlyRounded(nn.Module):
    """A layer whose weights lie between the two points of their grid that are next to them."""

    def __init__(self, layer: Layer, quantizer: FakeQuantize) -> None:
        super().__init__()
        self.layer = layer
        weight = parametrization_input(layer, quantizer)
        shape = (-1, *[1] * (weight.ndim - 1)) if quantizer.scale.ndim else ()
        self.scale = quantizer.scale.detach().reshape(shape)
        self.zero = quantizer.zero_point.detach().reshape(shape)
        self.ends = quantizer.grid.minimum, quantizer.grid.maximum
        self.floor = torch.floor(weight / self.scale)
        low, high = _STRETCHED
        part = (weight / self.scale - self.floor).clamp(1e-3, 1 - 1e-3)
        self.moves = (weight != 0).to(weight.dtype)  # what is masked stays zero
        self.logits = nn.Parameter(-torch.log((high - low) / (part - low) - 1))

    def up(self) -> Tensor:
        """How far each weight goes up: 0 to 1, of the shape of the weight."""
        low, high = _STRETCHED
        return (torch.sigmoid(self.logits) * (high - low) + low).clamp(0, 1) * self.moves

    def shown(self, up: Tensor) -> Tensor:
        """The weight, its parts of a step being `up`."""
        return ((self.floor + up + self.zero).clamp(*self.ends) - self.zero) * self.scale

    def forward(self, values: Tensor) -> Tensor:
        """What the layer gives with these weights."""
        weight = self.shown(self.up())
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(values, weight, self.layer.bias)  # pyright: ignore[reportPrivateUsage]  # with its padding mode
        return nn.functional.linear(values, weight, self.layer.bias)


class _Dropping(nn.Module):
    """A quantizer that lets a share of the values pass in float, drawn anew each time."""

    def __init__(self, quantizer: FakeQuantize, drop: float, draw: torch.Generator) -> None:
        super().__init__()
        self.learned = FakeQuantize(quantizer.grid).to(quantizer.scale.device).learn_step(of_images=True)
        self.learned.set_grid(quantizer.scale, quantizer.zero_point)
        self.drop, self.draw = drop, draw

    def forward(self, values: Tensor, *, moved: bool = False) -> Tensor:
        """`values` of any shape."""
        return _mixed(self.learned(values), values, self.drop, self.draw)


def _mixed(rounded: Tensor, exact: Tensor, drop: float, draw: torch.Generator) -> Tensor:
    if not drop:
        return rounded
    dropped = torch.empty_like(rounded, device=draw.device).uniform_(generator=draw).lt_(drop).to(rounded.device)
    return torch.lerp(rounded, exact, dropped)  # exactly one of the two, in a tenth of the time of `where` on a CPU


def reconstruct(
    quantizers: Quantizers,
    original: fx.GraphModule,
    images: Tensor,
    how: Reconstruction,
    *,
    progress: ProgressReporter = NO_PROGRESS,
    checkpoint: Callable[[], None] = lambda: None,
) -> None:
    """Learns the rounding of all weights, from the first section to the last; what is done already is passed over.

    Args:
        quantizers: on the network, in eval, with ranges for all; its weights are moved to points of their grids.
        original: the same network, of which nothing rounds.
        images: (N, C, H, W), as the networks want them.
        how: the parts, and what is learned.
        progress: reports the iterations.
        checkpoint: called after each part.
    """
    if all(map(quantizers.lies_on_its_grid, quantizers.layers)):
        return
    graph = quantizers.graph
    cut = [
        (section, part, layers)
        for section in sections(graph)
        for part in ([section] if how.whole_sections else layer_sections(graph, section))
        if (layers := [name for name in part.layers if name in quantizers.layers])
    ]
    progress.start("reconstruction", len(cut) * how.iterations)
    values = _Values(images, images, images)
    at = cut[0][0]
    for number, (section, part, layers) in enumerate(cut):
        if section != at:
            values, at = values.through(quantizers, original, at.begin, section.begin), section
        reached = 0
        if not all(map(quantizers.lies_on_its_grid, layers)):
            learning = _Learning(quantizers, original, section, part, values, how, seed=how.seed + number)
            for done in learning.run(layers):
                progress.advance(done - reached)
                reached = done
        progress.advance(how.iterations - reached)
        checkpoint()


@dataclass(frozen=True)
class _Values:
    """What reaches a place: in float; from rounded weights, activations in float; and with all rounded. (N, ...)."""

    exact: Tensor
    of_weights: Tensor
    rounded: Tensor

    def through(self, quantizers: Quantizers, original: fx.GraphModule, begin: str, end: str) -> _Values:
        """What reaches `end` of what is here, at `begin`."""
        part = between(quantizers.graph, begin, end)
        with _activations_in_float(quantizers):
            of_weights = _run(part, self.of_weights)
        return _Values(_run(between(original, begin, end), self.exact), of_weights, _run(part, self.rounded))


class _Learning:
    """The rounding of one part of the network, and the steps of its activations."""

    def __init__(
        self,
        quantizers: Quantizers,
        original: fx.GraphModule,
        section: Section,
        part: Section,
        values: _Values,
        how: Reconstruction,
        *,
        seed: int,
    ) -> None:
        self.quantizers, self.part, self.how = quantizers, part, how
        self.draw = torch.Generator().manual_seed(seed)
        self.values = values.through(quantizers, original, section.begin, part.begin)
        self.target = _run(between(original, section.begin, part.end), values.exact)

    def run(self, layers: list[str]) -> Iterator[int]:
        """Iterations that are done."""
        nodes = between(self.quantizers.graph, self.part.begin, self.part.end).graph.nodes
        # a step is learned in the part that it lies in; parts behind, which values on its grid are moved to, take it
        names = {node.target for node in nodes if not node.kwargs.get("moved")}
        edges = [name for name in self.quantizers.activations if name in names and self.how.learn_steps]
        soft = {name: _SoftlyRounded(*self._layer(name)) for name in layers}
        steps = {name: _Dropping(self.quantizers.of_activation(name), self.how.drop, self.draw) for name in edges}
        if self.how.learn_steps:
            yield from self._minimise(soft, steps, self.values.rounded)
        else:
            with _activations_in_float(self.quantizers):
                yield from self._minimise(soft, {}, self.values.of_weights)
        self._settle(soft)
        for name, each in steps.items():
            self.quantizers.of_activation(name).set_grid(each.learned.scale, each.learned.zero_point)

    def _layer(self, name: str) -> tuple[Layer, FakeQuantize]:
        layer = self.quantizers.graph.get_submodule(name)
        assert isinstance(layer, Layer)
        return layer, self.quantizers.of_weight(name)

    def _minimise(self, soft: dict[str, _SoftlyRounded], steps: dict[str, _Dropping], inputs: Tensor) -> Iterator[int]:
        module = between(self.quantizers.graph, self.part.begin, self.part.end, {**soft, **steps}).eval()
        logits, scales = [each.logits for each in soft.values()], [each.learned.scale for each in steps.values()]
        optimizer = torch.optim.Adam([{"params": logits, "lr": _ROUNDING_RATE}, {"params": scales, "lr": _STEP_RATE}])
        for iteration in range(self.how.iterations):
            progress = iteration / self.how.iterations
            optimizer.param_groups[1]["lr"] = _STEP_RATE * (1 + math.cos(math.pi * progress)) / 2
            chosen = torch.randint(len(inputs), (_BATCH,), generator=self.draw).to(inputs.device)
            values = _mixed(inputs[chosen], self.values.exact[chosen], self.how.drop, self.draw)
            loss = _error(module(values), self.target[chosen]) + _undecided(soft.values(), progress)
            learned = [*logits, *scales]
            for parameter, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
                parameter.grad = gradient  # of these alone: the network's own parameters stay as they are
            optimizer.step()
            for each in steps.values():
                each.learned.follow_step()
            if iteration % _TOLD_EVERY == _TOLD_EVERY - 1:
                yield iteration + 1

    @torch.no_grad()
    def _settle(self, soft: dict[str, _SoftlyRounded]) -> None:
        """Moves the weights to the points that they are rounded to; masked ones stay where they were."""
        for name, each in soft.items():
            layer, _ = self._layer(name)
            original, mask = parametrized(layer).original, weight_mask(layer)
            assert isinstance(original, Tensor)
            points = each.shown((each.up() >= 0.5).to(original.dtype))
            original.copy_(points if mask is None else torch.where(mask.mask, points, original))


def _error(answers: Tensor, target: Tensor) -> Tensor:
    """Of (N, C, ...): the mean over all but C of the sum over C."""
    return (answers - target).square().sum(1).mean()


def _undecided(soft: Iterable[_SoftlyRounded], progress: float) -> Tensor | float:
    """What weights that lie between two points cost; nothing in the first fifth."""
    if progress < _WARM_UP:
        return 0.0
    beta = _SHARPEST + (_SOFTEST - _SHARPEST) * (1 - (progress - _WARM_UP) / (1 - _WARM_UP))
    costs = [(1 - (2 * each.up() - 1).abs().pow(beta)).sum() for each in soft]
    return _ROUNDING_WEIGHT * torch.stack(costs).sum() if costs else 0.0


@contextmanager
def _activations_in_float(quantizers: Quantizers) -> Generator[None]:
    edges = [quantizers.of_activation(name) for name in quantizers.activations]
    ready = [edge.enabled for edge in edges]
    for edge in edges:
        edge.enabled = False
    try:
        yield
    finally:
        for edge, was in zip(edges, ready, strict=True):
            edge.enabled = was


@torch.no_grad()
def _run(part: fx.GraphModule, values: Tensor) -> Tensor:
    return torch.cat([part(some) for some in values.split(_RUN_BATCH)])
