"""Layers of the compressed network: shapes, quantization grids, zeros, clipping and output errors."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tersor.evaluation.costs import costs
from tersor.graph.capture import layer_of
from tersor.graph.forward_call import run
from tersor.graph.layer_selection import Convolution, Layer, weighted_layers
from tersor.graph.parametrization import parametrizations_of, parametrized
from tersor.quantization.fake_quantize import FakeQuantize, weight_quantizer
from tersor.quantization.grid import to_integers
from tersor.quantization.qdq_placement import entering

_BINS = 128


@torch.no_grad()
def layer_table(original: nn.Module, model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """One entry for each convolution and fully connected layer of `model`, in plain values.

    `original_shape` is the shape of the layer with the same name in `original`. For a float layer, the histogram's
    `before` shows the weights of that layer. If the two networks do not have the same layer names, `original_shape` is
    None and `before` is empty. `clipped` is the fraction of the layer's input values outside the range of the input
    quantizer. `error` is |y - y'| / |y| in the 2-norm over all images: y' is the layer's output, y its output with
    unquantized inputs and weights (masks stay). Both are None if the layer is not quantized, or if its parent module
    uses its weight without calling it.

    Args:
        original: the network before compression; both are on the CPU and in eval mode.
        model: the compressed network.
        images: (N, C, H, W), as `model` expects them.
    """
    originals, layers = weighted_layers(original), weighted_layers(model)
    if originals.keys() != layers.keys():
        originals = {}
    clipped, errors = _clipping_and_errors(model, layers, images)
    entries: list[dict[str, Any]] = []
    for cost in costs(model, images[:1]).layers:
        if cost.name not in layers:
            continue
        layer = layers[cost.name]
        quantizer, before = weight_quantizer(layer), originals.get(cost.name)
        weight = layer.weight.detach()
        entries.append(
            {
                "name": cost.name,
                "kind": cost.kind,
                "original_shape": None if before is None else list(before.weight.shape),
                "shape": list(weight.shape),
                "macs": cost.macs,
                "sparsity": cost.sparsity,
                "zeros": int((weight == 0).sum()),
                "masked": cost.masked,
                "weight_bits": cost.weight_bits,
                "activation_bits": cost.activation_bits,
                "levels": None if quantizer is None else len(_integers(weight, quantizer).unique()),
                "clipped": clipped.get(cost.name),
                "error": errors.get(cost.name),
                "histogram": _quantized_histogram(layer, quantizer) if quantizer else _float_histogram(weight, before),
            }
        )
    return entries


def _unquantized(layer: Layer) -> Tensor:
    """The masked weight before quantization."""
    if not any(True for _ in parametrizations_of(layer)):
        return layer.weight
    weight = parametrized(layer).original
    for parametrization in parametrizations_of(layer):
        if not isinstance(parametrization, FakeQuantize):
            weight = parametrization(weight)
    return weight


def _clipping_and_errors(
    model: nn.Module, layers: dict[str, Layer], images: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """Layer -> clipped fraction of its input, and layer -> relative error of its output, in one pass."""
    inputs = _input_quantizers(model)
    raw: dict[nn.Module, Tensor] = {}
    outside: defaultdict[nn.Module, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
    squares: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))

    def count_clipped(quantizer: nn.Module, values: tuple[Tensor, ...]) -> None:
        assert isinstance(quantizer, FakeQuantize)
        raw[quantizer] = values[0]
        integers = torch.round(values[0] / quantizer.scale) + quantizer.zero_point
        beyond = (integers < quantizer.grid.minimum) | (integers > quantizer.grid.maximum)
        outside[quantizer] += torch.tensor([beyond.sum(), beyond.numel()])

    def add_squares(layer: nn.Module, values: tuple[Tensor, ...], output: Tensor, *, name: str) -> None:
        assert isinstance(layer, Layer)
        unquantized = raw.get(inputs[name], values[0]) if name in inputs else values[0]
        # after a reshape the shapes differ: the input was quantized before it
        exact = _apply(layer, unquantized if unquantized.shape == values[0].shape else values[0])
        squares[name] += torch.stack([(output - exact).double().square().sum(), exact.double().square().sum()])

    quantized = {name: layer for name, layer in layers.items() if weight_quantizer(layer) or name in inputs}
    hooks = [quantizer.register_forward_pre_hook(count_clipped) for quantizer in set(inputs.values())]
    hooks += [layer.register_forward_hook(partial(add_squares, name=name)) for name, layer in quantized.items()]
    try:
        for batch in images.split(64):
            run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    shares = {quantizer: float(beyond / total) for quantizer, (beyond, total) in outside.items()}
    clipped = {name: shares[quantizer] for name, quantizer in inputs.items() if quantizer in shares}
    return clipped, {name: float((off / exact).sqrt()) for name, (off, exact) in squares.items() if exact > 0}


def _apply(layer: Layer, values: Tensor) -> Tensor:
    weight = _unquantized(layer)
    if isinstance(layer, Convolution):
        return layer._conv_forward(values, weight, layer.bias)  # pyright: ignore[reportPrivateUsage]  # with its padding mode
    return F.linear(values, weight, layer.bias)


def _input_quantizers(model: nn.Module) -> dict[str, FakeQuantize]:
    """Layer -> the quantizer of its input, in a captured network."""
    quantizers: dict[str, FakeQuantize] = {}
    for node in model.graph.nodes if isinstance(model, fx.GraphModule) else ():
        if not isinstance(layer_of(node), Layer):
            continue
        quantizer = layer_of(entering(node))
        if isinstance(quantizer, FakeQuantize) and quantizer.enabled:
            quantizers[str(node.target)] = quantizer
    return quantizers


def _scale_and_zero_point(weight: Tensor, quantizer: FakeQuantize) -> tuple[Tensor, Tensor]:
    """Shaped to broadcast against the weight (C_out, ...)."""
    scale, zero_point = quantizer.scale.detach(), quantizer.zero_point.detach()
    shape = (-1, *[1] * (weight.ndim - 1))
    return scale.reshape(shape) if scale.ndim else scale, zero_point.reshape(shape) if zero_point.ndim else zero_point


def _integers(weight: Tensor, quantizer: FakeQuantize) -> Tensor:
    return to_integers(weight, *_scale_and_zero_point(weight, quantizer), quantizer.grid)


def _quantized_histogram(layer: Layer, quantizer: FakeQuantize) -> dict[str, Any]:
    """Weights before and after rounding, divided by the step size of their channel, so grid points are integers."""
    integers = _integers(layer.weight, quantizer).float()
    scale, zero_point = _scale_and_zero_point(layer.weight, quantizer)
    before = _unquantized(layer) / scale + zero_point
    low = math.floor(min(before.min().item(), integers.min().item()) + 0.5) - 0.5
    span = math.ceil(max(before.max().item(), integers.max().item()) - 0.5) + 0.5 - low
    width = 2.0 ** math.ceil(math.log2(span / _BINS))
    after_width = max(1.0, width)
    steps = scale.flatten()
    return {
        "unit": "steps",
        "low": low,
        "width": width,
        "before": _counts(before, low, width, math.ceil(span / width)),
        "after_width": after_width,
        "after": _counts(integers, low, after_width, math.ceil(span / after_width)),
        "grid": [quantizer.grid.minimum, quantizer.grid.maximum],
        "step": [steps.min().item(), steps.median().item(), steps.max().item()],
    }


def _float_histogram(weight: Tensor, original: Layer | None) -> dict[str, Any]:
    """Weights of the original layer, if there is one, and of the compressed layer."""
    both = [weight] if original is None else [original.weight.detach(), weight]
    low, high = min(each.min().item() for each in both), max(each.max().item() for each in both)
    width = (high - low) / _BINS or 1.0
    counts = [_counts(each, low, width, _BINS) for each in both]
    return {
        "unit": "value",
        "low": low,
        "width": width,
        "before": counts[0] if original is not None else [],
        "after_width": width,
        "after": counts[-1],
        "grid": None,
        "step": None,
    }


def _counts(values: Tensor, low: float, width: float, bins: int) -> list[int]:
    indices = ((values.flatten().double() - low) / width).floor().long().clamp(0, bins - 1)
    return torch.bincount(indices, minlength=bins).tolist()
