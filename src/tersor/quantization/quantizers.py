"""Quantizers on a captured network: inserting, finding and calibrating them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from tersor.core.errors import InputError
from tersor.core.target import Target
from tersor.data.batch import first_batch
from tersor.graph.capture import capture, layer_of, values_into
from tersor.graph.layer_selection import Layer, matching, weighted_layers
from tersor.graph.matrix_products import write_as_matrix_products
from tersor.graph.parametrization import parametrization_input, parametrizations_of
from tersor.quantization.activation_products import matrix_products, products_faster_in_integers
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid, affine_parameters
from tersor.quantization.observers import Histogram, Range, WeightRange, weight_grid, without_saturation
from tersor.quantization.qdq_placement import (
    activation_quantizers,
    computed,
    entering,
    insert_activation_quantizers,
    without_quantizers,
)
from tersor.quantization.quantizer_options import BYTE, Precision, QuantizedTrainingOptions
from tersor.quantization.runtime_defects import correct_in_integers, rewrite_for_openvino

SATURATION = (
    "the processor accumulates 8-bit products in 16 bits (target.cpu: avx2), so the range of a channel is widened if "
    "the sum of two products could saturate; write target: {cpu: vnni} for a processor that accumulates in 32 bits"
)


@dataclass(frozen=True)
class Quantizers:
    """The quantizers of a captured network.

    Attributes:
        graph: the network.
        layers: names of the layers with a quantized weight.
        activations: names of the quantizers of activations.
        products: names of the products of two activations whose operands are quantized.
    """

    graph: fx.GraphModule
    layers: tuple[str, ...]
    activations: tuple[str, ...]
    products: tuple[str, ...] = ()

    def of_weight(self, name: str) -> FakeQuantize:
        """The quantizer of a layer's weight."""
        return next(
            each for each in parametrizations_of(self.graph.get_submodule(name)) if isinstance(each, FakeQuantize)
        )

    def of_activation(self, name: str) -> FakeQuantize:
        """The quantizer of an activation."""
        quantizer = self.graph.get_submodule(name)
        assert isinstance(quantizer, FakeQuantize)
        return quantizer

    def all(self) -> tuple[FakeQuantize, ...]:
        """The quantizers of all weights, then of all activations."""
        return (*map(self.of_weight, self.layers), *map(self.of_activation, self.activations))

    @property
    def enabled(self) -> bool:
        """Whether any of them is enabled."""
        return any(each.enabled for each in self.all())

    @property
    def rounding(self) -> Quantizers:
        """The enabled ones; the others belong to layers that stay in float."""
        layers = tuple(name for name in self.layers if self.of_weight(name).enabled)
        activations = tuple(name for name in self.activations if self.of_activation(name).enabled)
        return Quantizers(self.graph, layers, activations, self.products_of(activations))

    def enable(self, layers: set[str], target: Target) -> None:
        """Enables the quantizers of `layers`, which are layers and products, and disables all others."""
        needed = activation_quantizers(self._bare, layers, target.runtime)
        for name in self.layers:
            self.of_weight(name).enabled = name in layers
        for name in self.activations:
            self.of_activation(name).enabled = name in needed

    @cached_property
    def _bare(self) -> fx.GraphModule:
        return without_quantizers(self.graph)

    def products_of(self, activations: Sequence[str]) -> tuple[str, ...]:
        """The names of the products whose operands are read through these quantizers."""
        return tuple(
            name
            for name, node in matrix_products(self.graph).items()
            if all(_quantizer(computed(value)) in activations for value in values_into(node))
        )

    def set_weight_grid(
        self, name: str, target: Target, weight_range: WeightRange = "minmax", percentile: float = 99.99
    ) -> None:
        """Sets the grid of a layer's weight from the input of its quantizer."""
        quantizer = self.of_weight(name)
        grid, per_channel = quantizer.grid, bool(quantizer.scale.ndim)
        weight = parametrization_input(self.graph.get_submodule(name), quantizer)
        scale, zero_point = weight_grid(
            weight, grid, per_channel=per_channel, weight_range=weight_range, percentile=percentile
        )
        quantizer.set_grid(scale, zero_point)
        self.limit_for_avx2_saturation(name, target)

    @torch.no_grad()
    def limit_for_avx2_saturation(self, name: str, target: Target) -> None:
        """Widens the scale of a layer's weight if the processor would saturate otherwise."""
        if target.cpu == "avx2":
            quantizer = self.of_weight(name)
            weight = parametrization_input(self.graph.get_submodule(name), quantizer)
            quantizer.scale.copy_(without_saturation(weight, quantizer.scale, quantizer.grid))

    def set_activation_grids(
        self, histograms: Mapping[str, Histogram], activation_range: Range = "minmax", percentile: float = 99.99
    ) -> None:
        """Sets the grids of all activations from their histograms."""
        for name in self.activations:
            quantizer = self.of_activation(name)
            low, high = histograms[name].range(activation_range, quantizer.grid, percentile)
            quantizer.set_grid(*affine_parameters(low, high, quantizer.grid))

    @torch.no_grad()
    def is_on_grid(self, name: str) -> bool:
        """Whether rounding the weight of a layer changes nothing."""
        quantizer = self.of_weight(name)
        weight = parametrization_input(self.graph.get_submodule(name), quantizer)
        return quantizer.enabled and torch.equal(quantizer(weight), weight)

    def input_of(self, name: str) -> str | None:
        """The name of the quantizer of a layer's input, if there is one."""
        node = next(node for node in self.graph.graph.nodes if node.op == "call_module" and node.target == name)
        return _quantizer(entering(node))


def _quantizer(value: fx.Node) -> str | None:
    return str(value.target) if isinstance(layer_of(value), FakeQuantize) else None


def find_quantizers(model: nn.Module) -> Quantizers | None:
    """The quantizers of a captured network; None if there are none.

    If some are enabled, the disabled ones belong to layers that stay in float, and are left out.
    """
    if not isinstance(model, fx.GraphModule):
        return None
    edges = dict.fromkeys(str(node.target) for node in model.graph.nodes if isinstance(layer_of(node), FakeQuantize))
    layers = [
        name
        for name, layer in weighted_layers(model).items()
        if any(isinstance(each, FakeQuantize) for each in parametrizations_of(layer))
    ]
    quantizers = Quantizers(model, tuple(layers), tuple(edges))
    quantizers = replace(quantizers, products=quantizers.products_of(quantizers.activations))
    if not quantizers.enabled:
        return quantizers if edges or layers else None
    return quantizers.rounding


def insert_quantizers(
    graph: fx.GraphModule, precision: Precision, *, exclude: Sequence[str], target: Target, method: str
) -> Quantizers:
    """Insert disabled quantizers on the weights of layers, and on the activations that the runtime needs quantized.

    Args:
        graph: a captured network without quantizers; it is changed.
        precision: bit widths and kinds of the grids.
        exclude: patterns of layers that stay in float.
        target: runtime and processor that the network is compressed for.
        method: the method's name, for error messages.

    Raises:
        InputError: a pattern that matches nothing, no layer left, a network that is already quantized.
    """
    if any(isinstance(module, FakeQuantize) for module in graph.modules()):
        raise InputError(
            "the network is already quantized. Use only one of ptq, adaround, brecq and mixed_precision; to train "
            "afterwards, add qat or lsq."
        )
    write_as_matrix_products(graph)
    if target.runtime == "openvino":
        rewrite_for_openvino(graph)
    known, weighted = correct_in_integers(graph, target.runtime), weighted_layers(graph)
    excluded = matching(exclude, [*weighted, *matrix_products(graph)])
    layers = {name: layer for name, layer in weighted.items() if name in known and name not in excluded}
    if not layers and known & weighted.keys():
        raise InputError(f"exclude leaves {method} no layer to quantize. Shorten exclude.")
    if not layers:
        none = f"{method} found no convolution or fully connected layer to quantize"
        raise InputError(f"{none}. Pass a network with such layers.")
    first_and_last = ends(graph)
    eligible = products_faster_in_integers(graph, target) if precision.activation_bits == BYTE else ()
    products, grid = tuple(name for name in eligible if name not in excluded), precision.activation(end=False)
    activations = insert_activation_quantizers(graph, [*layers, *products], grid, target.runtime)
    for name, layer in layers.items():
        _insert_on_weight(layer, precision.weight(end=name in first_and_last), per_channel=precision.per_channel)
    quantizers = Quantizers(graph, tuple(layers), tuple(activations), products)
    for name in map(quantizers.input_of, first_and_last & layers.keys()):
        if name is not None:
            quantizers.of_activation(name).grid = precision.activation(end=True)
    for name in activations:
        graph.get_submodule(name).to(next(graph.parameters()).device)
    return quantizers


def insert_or_reuse_quantizers(
    model: nn.Module, options: QuantizedTrainingOptions, *, data: Iterable[Any] | None, target: Target, method: str
) -> Quantizers:
    """For methods that train: the quantizers of an earlier stage, or new ones on the captured network.

    Args:
        model: the network.
        options: bit widths and kinds of the grids, which must agree with those of the earlier stage.
        data: images to calibrate with; needed for new quantizers.
        target: runtime and processor that the network is compressed for.
        method: the method's name, for error messages.

    Raises:
        InputError: no data, a pattern that matches nothing, no layer left, options that differ from the grids of the
            earlier stage, or grids that another method of the stage trains.
    """
    quantizers = find_quantizers(model)
    if quantizers is None:
        images = first_batch(require_data(data, method), method)
        return insert_quantizers(
            capture(model, images), options.precision, exclude=options.exclude, target=target, method=method
        )
    if options.exclude:
        raise InputError("an earlier stage has quantized the network. Write `exclude` in that stage.")
    if any(each.is_trained for each in quantizers.all()):
        raise InputError("a method of this stage trains the grids already. Write either qat or lsq, not both.")
    _require_same_options(quantizers, options, method)
    return quantizers


def _require_same_options(quantizers: Quantizers, options: QuantizedTrainingOptions, method: str) -> None:
    """The options that are set agree with the grids of an earlier stage."""
    first_and_last = ends(quantizers.graph)
    entering = set(map(quantizers.input_of, first_and_last))
    existing = {
        "bits": {quantizers.of_weight(name).grid.bits for name in quantizers.layers if name not in first_and_last},
        "activation_bits": {
            quantizers.of_activation(name).grid.bits for name in quantizers.activations if name not in entering
        },
        "first_last_bits": {quantizers.of_weight(name).grid.bits for name in first_and_last & {*quantizers.layers}},
    }
    for key, widths in existing.items():
        bits = getattr(options, key)
        if bits is not None and widths - {bits}:
            raise InputError(
                f"{method} has {key}: {bits}, but an earlier stage has quantized the network to "
                f"{', '.join(map(str, sorted(widths)))} bits. Leave out {key} to keep those bits, or write the same "
                f"{key} in the earlier stage."
            )
    kinds = {bool(quantizers.of_weight(name).scale.ndim) for name in quantizers.layers}
    if options.per_channel is not None and kinds - {options.per_channel}:
        raise InputError(
            f"{method} has per_channel: {str(options.per_channel).lower()}, but an earlier stage has quantized with "
            "the other value. Leave out per_channel to keep that value, or write the same one in the earlier stage."
        )


def require_data(data: Iterable[Any] | None, method: str) -> Iterable[Any]:
    """`data`, which `method` calibrates with.

    Raises:
        InputError: there is none.
    """
    if data is None:
        raise InputError(f"{method} needs images to calibrate with. Pass a few hundred: AttachContext(data=...).")
    return data


def notes(quantizers: Quantizers, target: Target) -> tuple[str, ...]:
    """Notes for the user about the inserted quantizers."""
    wide = any(quantizers.of_weight(name).grid.maximum > 64 for name in quantizers.layers)
    return (SATURATION,) if target.cpu == "avx2" and wide else ()


def ends(graph: fx.GraphModule) -> set[str]:
    """The names of the first and last layer called."""
    called = [str(node.target) for node in graph.graph.nodes if isinstance(layer_of(node), Layer)]
    return {called[0], called[-1]}


def _insert_on_weight(layer: Layer, grid: Grid, *, per_channel: bool) -> None:
    quantizer = FakeQuantize(grid, channels=layer.weight.shape[0] if per_channel else None)
    parametrize.register_parametrization(layer, "weight", quantizer.to(layer.weight.device))
