"""Costs (MACs, parameters, sparsity, bits) of a network, which is not changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.core.target import Target
from tersor.data.network_inputs import NetworkInput
from tersor.graph.aten import class_of_place, place_of
from tersor.graph.layer_selection import prunable, weighted_layers
from tersor.pruning.mask import weight_mask
from tersor.quantization.fake_quantize import weight_quantizer
from tersor.quantization.operators import run_through

FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerCosts:
    """Costs of one layer for one input.

    Attributes:
        name: path in the network; empty for matrix products outside any module.
        kind: class name, such as `Conv2d`.
        weight_shape: shape of the weight; empty without a single weight.
        macs: multiply-accumulate operations of convolutions, matrix products, attention and recurrent layers.
        parameters: number of trainable values.
        sparsity: fraction of zeros in the effective weight, after masks and quantizers.
        masked: fraction of masked weights, without zeros from rounding.
        weight_bits: bit width of the weight; 32 if it is not quantized.
        activation_bits: bit width of the input; 32 if it is not quantized.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    macs: int
    parameters: int
    sparsity: float
    masked: float
    weight_bits: int
    activation_bits: int


@dataclass(frozen=True)
class Costs:
    """Costs of a network for one input.

    Attributes:
        parameters: number of trainable values in all layers; those of a parametrized layer count once.
        macs: multiply-accumulate operations of all layers.
        bit_operations: sum over the layers of macs * weight bits * activation bits.
        sparsity: fraction of zeros in the prunable weights: those of the convolutions, or of the fully connected layers
            if the network has no convolution.
        masked: fraction of the same weights that is masked.
        layers: every layer with MACs or a weight.
        uncounted: multiplying operators that are not included, each with its module: `aten._fft_r2c in blocks.0`. By
            convention, elementwise operators, normalization, pooling and resizing are not counted.
    """

    parameters: int
    macs: int
    bit_operations: int
    sparsity: float
    masked: float
    layers: tuple[LayerCosts, ...]
    uncounted: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """A line about the operators that are not included in the MACs, if there are any."""
        names = ", ".join(self.uncounted)
        return (f"the MACs do not include these uncounted operators: {names}",) if names else ()


def costs(model: nn.Module, example: NetworkInput) -> Costs:
    """The costs of `model` for one input.

    Args:
        model: the network, with or without masks and quantizers.
        example: input images (N, C, H, W); the first is run through the network.
    """
    ran = run_through(model, example[:1])
    modules = dict(model.named_modules())
    macs, activation_bits, kinds = Counter[str](), dict[str, int](), dict[str, str]()
    for product in ran.products:
        name = product.module or place_of(product.node)
        while name not in modules:  # a captured network has no modules without parameters
            name = name.rpartition(".")[0]
        if product.node is not None and type(modules[name]) is nn.Module:  # holds the weights of a module in parts
            kinds[name] = class_of_place(product.node)
        macs[name] += product.macs
        activation_bits[name] = max(activation_bits.get(name, 0), product.operands[0].bits or FLOAT_BITS)
    weighted = weighted_layers(model)
    layers = tuple(
        _layer_costs(name, module, macs[name], activation_bits.get(name, FLOAT_BITS), kinds.get(name))
        for name, module in modules.items()
        if macs[name] or name in weighted
    )
    prunable_layers = [*prunable(model).values()] if weighted else []
    return Costs(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=sum(layer.macs for layer in layers),
        bit_operations=sum(layer.macs * layer.weight_bits * layer.activation_bits for layer in layers),
        sparsity=_sparsity(layer.weight for layer in prunable_layers),
        masked=_sparsity(map(_mask, prunable_layers)),
        layers=layers,
        uncounted=ran.uncounted,
    )


@torch.no_grad()
def _layer_costs(name: str, module: nn.Module, macs: int, activation_bits: int, kind: str | None) -> LayerCosts:
    weight = getattr(module, "weight", None)  # the effective weight, after masks and quantizers
    weight = weight if isinstance(weight, Tensor) else None
    quantizer = weight_quantizer(module)
    parameters = list(module.parameters(recurse=False))
    if parametrize.is_parametrized(module):
        parameters += list(module.get_submodule("parametrizations").parameters())
    return LayerCosts(
        name=name,
        kind=kind or parametrize.type_before_parametrizations(module).__name__,
        weight_shape=() if weight is None else tuple(weight.shape),
        macs=macs,
        parameters=sum(parameter.numel() for parameter in parameters),
        sparsity=0.0 if weight is None else _sparsity([weight]),
        masked=0.0 if weight is None else _sparsity([_mask(module)]),
        weight_bits=quantizer.grid.bits if quantizer else FLOAT_BITS,
        activation_bits=activation_bits,
    )


def _mask(layer: nn.Module) -> Tensor:
    """Mask of the weight's shape, False where masked."""
    mask = weight_mask(layer)
    if mask is not None:
        return mask.mask
    assert isinstance(layer.weight, Tensor)
    return torch.ones_like(layer.weight, dtype=torch.bool)


@torch.no_grad()
def _sparsity(weights: Iterable[Tensor]) -> float:
    zeros = total = 0
    for weight in weights:
        zeros += int((weight == 0).sum())
        total += weight.numel()
    return zeros / total if total else 0.0


def macs_ratio(original: nn.Module, example: NetworkInput, _target: Target) -> Callable[[nn.Module], float]:
    """The MACs of a network divided by those of `original`: replaces a latency ratio when nothing is measured."""
    before = costs(original, example).macs
    return lambda network: costs(network, example).macs / before
