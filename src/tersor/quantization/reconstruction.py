"""Block reconstruction: learns the rounding of weights, part by part, to minimize each part's output error.

    w_hat = s * (clip(floor(w / s) + h(v) + z, n, p) - z)         v of the shape of w, (C_out, ...)
    h(v)  = clip(1.2 sigmoid(v) - 0.1, 0, 1)                      rectified sigmoid: reaches 0 and 1
    loss  = mean over (N, H, W) of the sum over C of (y_hat - y)^2 + 0.01 sum of (1 - |2 h(v) - 1|^beta)

y is the part's output in float, y_hat its output for the inputs that the rounded parts before it produce. The second
term is off for the first fifth of the iterations; then beta falls from 20 to 2 and drives every h to 0 or 1. Finally
each weight is set to its point on the grid, so the `state_dict` shows which parts are done. If a network returns
several tensors, the error of its last part is the sum over them.

AdaRound, BRECQ and QDrop differ in the parts and in the inputs: see their files in `methods/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from tersor.core.progress import NO_PROGRESS, ProgressReporter
from tersor.graph.layer_selection import Convolution, Layer
from tersor.graph.parametrization import original_weight, parametrization_input
from tersor.pruning.mask import weight_mask
from tersor.quantization.blocks import Block, between, blocks, layer_blocks
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.quantizers import Quantizers

_BATCH = 32
_STRETCHED = (-0.1, 1.1)
_ROUNDING_WEIGHT = 0.01
_WARM_UP = 0.2
_SHARPEST, _SOFTEST = 2.0, 20.0
_ROUNDING_RATE = 1e-2
_STEP_RATE = 4e-4
_REPORT_EVERY = 50
_RUN_BATCH = 128


@dataclass(frozen=True)
class Reconstruction:
    """Options of a reconstruction.

    Attributes:
        by_block: reconstruct block by block, not layer by layer.
        learn_steps: learn the steps of activations together with the rounding, on rounded activations; otherwise the
            rounding is learned on activations in float.
        drop: share of the activations that stay in float, drawn anew in every iteration.
        iterations: iterations per part, with batches of 32 images.
        seed: seed of the random batches and of `drop`.
    """

    by_block: bool
    learn_steps: bool
    drop: float
    iterations: int
    seed: int


class _SoftRounding(nn.Module):
    """A layer whose weights lie between the two nearest points of their grid, at a learned position."""

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
        self.unmasked = (weight != 0).to(weight.dtype)  # zeros of a mask stay zero
        self.logits = nn.Parameter(-torch.log((high - low) / (part - low) - 1))

    def h(self) -> Tensor:
        """Position of each weight between its two points: 0 to 1, in the shape of the weight."""
        low, high = _STRETCHED
        return (torch.sigmoid(self.logits) * (high - low) + low).clamp(0, 1) * self.unmasked

    def weight(self, h: Tensor) -> Tensor:
        """The weight with the positions `h`."""
        return ((self.floor + h + self.zero).clamp(*self.ends) - self.zero) * self.scale

    def forward(self, values: Tensor) -> Tensor:
        """The layer's output with the current positions."""
        weight = self.weight(self.h())
        if isinstance(self.layer, Convolution):
            return self.layer._conv_forward(values, weight, self.layer.bias)  # pyright: ignore[reportPrivateUsage]  # with its padding mode
        return nn.functional.linear(values, weight, self.layer.bias)


class _QDrop(nn.Module):
    """A quantizer with a learned step that leaves a random share of the values in float."""

    def __init__(self, quantizer: FakeQuantize, drop: float, generator: torch.Generator) -> None:
        super().__init__()
        self.learned = FakeQuantize(quantizer.grid).to(quantizer.scale.device).learn_step(of_images=True)
        self.learned.set_grid(quantizer.scale, quantizer.zero_point)
        self.drop, self.generator = drop, generator

    def forward(self, values: Tensor, *, moved: bool = False) -> Tensor:
        """`values` of any shape."""
        return _mixed(self.learned(values), values, self.drop, self.generator)


def _mixed(rounded: Tensor, exact: Tensor, drop: float, generator: torch.Generator) -> Tensor:
    if not drop:
        return rounded
    dropped = (
        torch.empty_like(rounded, device=generator.device).uniform_(generator=generator).lt_(drop).to(rounded.device)
    )
    return torch.lerp(rounded, exact, dropped)  # exactly one of the two, in a tenth of the time of `where` on a CPU


def reconstruct(
    quantizers: Quantizers,
    original: fx.GraphModule,
    images: Tensor,
    options: Reconstruction,
    *,
    progress: ProgressReporter = NO_PROGRESS,
    checkpoint: Callable[[], None] = lambda: None,
) -> None:
    """Learn the rounding of all weights, from the first block to the last; parts that are done are skipped.

    Args:
        quantizers: calibrated, on the network in eval mode, whose weights are set to points of their grids.
        original: the same network with all quantizers disabled.
        images: calibration images (N, C, H, W).
        options: which parts, and what is learned.
        progress: reports the iterations.
        checkpoint: called after each part.
    """
    if all(map(quantizers.is_on_grid, quantizers.layers)):
        return
    graph = quantizers.graph
    parts = [
        (block, part, layers)
        for block in blocks(graph)
        for part in ([block] if options.by_block else layer_blocks(graph, block))
        if (layers := [name for name in part.layers if name in quantizers.layers])
    ]
    progress.start("reconstruction", len(parts) * options.iterations)
    values = _Values(images, images, images)
    current = parts[0][0]
    for number, (block, part, layers) in enumerate(parts):
        if block != current:
            values, current = values.through(quantizers, original, current.begin, block.begin), block
        reached = 0
        if not all(map(quantizers.is_on_grid, layers)):
            learning = _Learning(quantizers, original, block, part, values, options, seed=options.seed + number)
            for done in learning.run(layers):
                progress.advance(done - reached)
                reached = done
        progress.advance(options.iterations - reached)
        checkpoint()


@dataclass(frozen=True)
class _Values:
    """Values of one node (N, ...): in float, with rounded weights only, and with everything rounded."""

    exact: Tensor
    of_weights: Tensor
    rounded: Tensor

    def through(self, quantizers: Quantizers, original: fx.GraphModule, begin: str, end: str) -> _Values:
        """The values of the node `end`, from these of the node `begin`."""
        part = between(quantizers.graph, begin, end)
        with _activations_in_float(quantizers):
            of_weights = _run(part, self.of_weights)
        return _Values(_run(between(original, begin, end), self.exact), of_weights, _run(part, self.rounded))


class _Learning:
    """Learns the rounding of one part of the network, and the steps of its activations."""

    def __init__(
        self,
        quantizers: Quantizers,
        original: fx.GraphModule,
        block: Block,
        part: Block,
        values: _Values,
        options: Reconstruction,
        *,
        seed: int,
    ) -> None:
        self.quantizers, self.part, self.options = quantizers, part, options
        self.generator = torch.Generator().manual_seed(seed)
        self.values = values.through(quantizers, original, block.begin, part.begin)
        self.target = _run(between(original, block.begin, part.end), values.exact)

    def run(self, layers: list[str]) -> Iterator[int]:
        """Yields the number of iterations done."""
        nodes = between(self.quantizers.graph, self.part.begin, self.part.end).graph.nodes
        # a step is learned in the part where its quantizer is first called; parts that read moved values reuse it
        names = {node.target for node in nodes if not node.kwargs.get("moved")}
        edges = [name for name in self.quantizers.activations if name in names and self.options.learn_steps]
        soft = {name: _SoftRounding(*self._layer(name)) for name in layers}
        steps = {name: _QDrop(self.quantizers.of_activation(name), self.options.drop, self.generator) for name in edges}
        if self.options.learn_steps:
            yield from self._minimise(soft, steps, self.values.rounded)
        else:
            with _activations_in_float(self.quantizers):
                yield from self._minimise(soft, {}, self.values.of_weights)
        self._round(soft)
        for name, each in steps.items():
            self.quantizers.of_activation(name).set_grid(each.learned.scale, each.learned.zero_point)

    def _layer(self, name: str) -> tuple[Layer, FakeQuantize]:
        layer = self.quantizers.graph.get_submodule(name)
        assert isinstance(layer, Layer)
        return layer, self.quantizers.of_weight(name)

    def _minimise(self, soft: dict[str, _SoftRounding], steps: dict[str, _QDrop], inputs: Tensor) -> Iterator[int]:
        module = between(self.quantizers.graph, self.part.begin, self.part.end, {**soft, **steps}).eval()
        logits, scales = [each.logits for each in soft.values()], [each.learned.scale for each in steps.values()]
        optimizer = torch.optim.Adam([{"params": logits, "lr": _ROUNDING_RATE}, {"params": scales, "lr": _STEP_RATE}])
        for iteration in range(self.options.iterations):
            progress = iteration / self.options.iterations
            optimizer.param_groups[1]["lr"] = _STEP_RATE * (1 + math.cos(math.pi * progress)) / 2
            chosen = torch.randint(len(inputs), (_BATCH,), generator=self.generator).to(inputs.device)
            values = _mixed(inputs[chosen], self.values.exact[chosen], self.options.drop, self.generator)
            loss = _error(module(values), tree_map(itemgetter(chosen), self.target)) + _rounding_penalty(
                soft.values(), progress
            )
            learned = [*logits, *scales]
            for parameter, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
                parameter.grad = gradient  # only of these: the network's own parameters stay unchanged
            optimizer.step()
            for each in steps.values():
                each.learned.follow_step()
            if iteration % _REPORT_EVERY == _REPORT_EVERY - 1:
                yield iteration + 1

    @torch.no_grad()
    def _round(self, soft: dict[str, _SoftRounding]) -> None:
        """Sets the weights to the points that they are rounded to; masked weights stay unchanged."""
        for name, each in soft.items():
            layer, _ = self._layer(name)
            original, mask = original_weight(layer), weight_mask(layer)
            points = each.weight((each.h() >= 0.5).to(original.dtype))
            original.copy_(points if mask is None else torch.where(mask.mask, points, original))


def _error(outputs: Any, target: Any) -> Tensor:
    """Squared error of (N, C, ...): the sum over C, averaged over all other dimensions; summed over several tensors."""
    pairs = zip(tree_leaves(outputs), tree_leaves(target), strict=True)
    squares = [(one - other).square() for one, other in pairs if one.is_floating_point()]
    return torch.stack([each.sum(1).mean() if each.ndim > 1 else each.mean() for each in squares]).sum()


def _rounding_penalty(soft: Iterable[_SoftRounding], progress: float) -> Tensor | float:
    """Penalty on weights between two points; 0 in the first fifth of the iterations."""
    if progress < _WARM_UP:
        return 0.0
    beta = _SHARPEST + (_SOFTEST - _SHARPEST) * (1 - (progress - _WARM_UP) / (1 - _WARM_UP))
    costs = [(1 - (2 * each.h() - 1).abs().pow(beta)).sum() for each in soft]
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
def _run(part: fx.GraphModule, values: Tensor) -> Any:
    """The value (N, ...) that the part computes, or a tuple of all outputs of the network."""
    outputs = [part(some) for some in values.split(_RUN_BATCH)]
    return tree_map(lambda *parts: torch.cat(parts), *outputs)
