"""Quantizers on a captured network: laying them on weights and edges, and showing them images to find their ranges."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from tersor.core.affine import Grid, symmetric_scale
from tersor.core.attachment import Progress
from tersor.core.errors import InputError
from tersor.core.objective import images_of
from tersor.core.parametrization import FakeQuantize, shown_by, shown_to
from tersor.core.ranges import Histogram, channel_maxima, least_squares_scale, without_saturation
from tersor.core.selection import weighted_layers, without
from tersor.core.target import Target
from tersor.graph.capture import layer_of
from tersor.graph.placement import place, quantizable


@dataclass(frozen=True)
class Quantizers:
    """What lies on a captured network.

    Attributes:
        graph: the network.
        layers: names of those whose weight is on a grid.
        activations: names of the modules on its edges.
    """

    graph: fx.GraphModule
    layers: tuple[str, ...]
    activations: tuple[str, ...]

    def of_weight(self, name: str) -> FakeQuantize:
        """The quantizer on the weight of a layer."""
        return next(each for each in shown_by(self.graph.get_submodule(name)) if isinstance(each, FakeQuantize))

    def of_activation(self, name: str) -> FakeQuantize:
        """The quantizer on an edge."""
        quantizer = self.graph.get_submodule(name)
        assert isinstance(quantizer, FakeQuantize)
        return quantizer

    @property
    def ready(self) -> bool:
        """Whether all of them round."""
        weights, edges = map(self.of_weight, self.layers), map(self.of_activation, self.activations)
        return all(each.ready for each in (*weights, *edges))

    def set_weight_grid(self, name: str, target: Target, weight_range: str = "minmax") -> None:
        """Fits the scales of a layer to the weight that its quantizer is shown."""
        quantizer = self.of_weight(name)
        weight = shown_to(self.graph.get_submodule(name), quantizer)
        if weight_range == "mse":
            scale = least_squares_scale(weight, quantizer.grid)
        else:
            scale = symmetric_scale(channel_maxima(weight), quantizer.grid)
        if target.cpu == "avx2":
            scale = without_saturation(weight, scale, quantizer.grid)
        quantizer.set_grid(scale)


def found(model: nn.Module) -> Quantizers | None:
    """What lies on a captured network already; None where no grid does."""
    if not isinstance(model, fx.GraphModule):
        return None
    edges = dict.fromkeys(str(node.target) for node in model.graph.nodes if isinstance(layer_of(node), FakeQuantize))
    layers = [
        name
        for name, layer in weighted_layers(model).items()
        if any(isinstance(each, FakeQuantize) for each in shown_by(layer))
    ]
    return Quantizers(model, tuple(layers), tuple(edges)) if edges or layers else None


def lay(
    graph: fx.GraphModule, *, bits: int, activation_bits: int, exclude: Sequence[str], target: Target, method: str
) -> Quantizers:
    """Lays quantizers that do not round yet: on the weights of layers, and where the runtime wants them on edges.

    Args:
        graph: a captured network without grids; it is changed.
        bits: of a weight.
        activation_bits: of an activation.
        exclude: patterns of layers that stay in float.
        target: the runtime and processor that the network is made for.
        method: how errors call who asks.

    Raises:
        InputError: a pattern that matches nothing, no layer left, a grid already there.
    """
    if any(isinstance(module, FakeQuantize) for module in graph.modules()):
        raise InputError("the network is quantized already. Possible: ptq once, or ptq and then qat.")
    known = quantizable(graph)
    chosen = without(weighted_layers(graph), exclude)
    layers = {name: layer for name, layer in chosen.items() if name in known}
    if not layers:
        raise InputError(f"{method} found no convolution or fully connected layer to quantize.")
    activations = place(graph, layers, Grid.unsigned(activation_bits), target.runtime)
    for layer in layers.values():
        quantizer = FakeQuantize(Grid.signed(bits), channels=layer.weight.shape[0]).to(layer.weight.device)
        parametrize.register_parametrization(layer, "weight", quantizer)
    for name in activations:
        graph.get_submodule(name).to(next(graph.parameters()).device)
    return Quantizers(graph, tuple(layers), tuple(activations))


def calibrate(
    quantizers: Quantizers, data: Iterable[Any], *, images: int, passes: int, method: str
) -> Generator[Progress, None, dict[str, Histogram]]:
    """Shows the network `images` of `data`, once for the ranges of its activations, twice for how often each value is.

    Returns:
        A histogram for each of the activations.

    Raises:
        InputError: the data holds no image, or cannot be read again; values are not finite.
    """
    histograms = {name: Histogram() for name in quantizers.activations}
    quantizers.graph.eval()
    done = 0
    for number, look in enumerate((Histogram.widen, Histogram.count)[:passes]):
        before = done
        for batch in _first_images(data, images, next(quantizers.graph.parameters()).device):
            _observe(quantizers, {name: partial(look, histogram) for name, histogram in histograms.items()}, batch)
            done += len(batch)
            yield Progress("calibration", done, passes * images)
        if done == before:
            again = " when it read it again; a DataLoader or a list can be read twice" if number else ""
            raise InputError(f"{method} was given data without a single image{again}. Pass batches (N, C, H, W).")
        _refuse_what_is_not_finite(histograms)
    return histograms


def _first_images(data: Iterable[Any], images: int, device: torch.device) -> Iterator[Tensor]:
    left = images
    for batch in data:
        found = images_of(batch)[:left]
        if not found.is_floating_point():
            raise InputError(f"a batch of the data is of {found.dtype}. Pass normalised images in floating point.")
        if len(found):
            yield found.to(device)
        left -= len(found)
        if left <= 0:
            return


@torch.inference_mode()
def _observe(quantizers: Quantizers, watchers: dict[str, Callable[[Tensor], None]], images: Tensor) -> None:
    """Shows every quantizer's input to its watcher; a value that movers hand on is shown once."""
    seen: set[nn.Module] = set()

    def look(module: nn.Module, inputs: tuple[Tensor, ...], watch: Callable[[Tensor], None]) -> None:
        if module not in seen:
            seen.add(module)
            watch(inputs[0])

    hooks = [
        quantizers.of_activation(name).register_forward_pre_hook(partial(look, watch=watch))
        for name, watch in watchers.items()
    ]
    try:
        quantizers.graph(images)
    finally:
        for hook in hooks:
            hook.remove()


def _refuse_what_is_not_finite(histograms: dict[str, Histogram]) -> None:
    for name, histogram in histograms.items():
        if not torch.isfinite(histogram.high - histogram.low):
            raise InputError(
                f"the calibration images give values that are not finite at {name.removeprefix('quantizers.')}. "
                "Possible: images and weights without NaN or infinity."
            )
