"""A network -> numbers: what it answers, and what it costs. Measuring leaves the network as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.core.errors import InputError
from tersor.core.target import Target
from tersor.data.batch import Batch
from tersor.graph.eval_mode import evaluating
from tersor.graph.layer_selection import prunable, weighted_layers
from tersor.pruning.mask import weight_mask
from tersor.quantization.fake_quantize import weight_quantizer
from tersor.quantization.operators import run_through

FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerCosts:
    """What one layer costs for one input.

    Attributes:
        name: its path in the network; empty for products that the network computes outside any layer.
        kind: its class, `Conv2d`.
        weight_shape: empty where it has no single weight.
        macs: multiplications that are added up: of convolutions, matrix products, attention and recurrent layers.
        parameters: numbers that are learned.
        sparsity: zeros among the weights that are shown, as a fraction.
        masked: weights under a mask, as a fraction: zeros that no rounding made.
        weight_bits: of the weight's grid; 32 where it is not quantized.
        activation_bits: of the input's grid; 32 where it is not quantized.
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
    """What a network costs for one input.

    Attributes:
        parameters: numbers that are learned, in all layers; those of a parametrized layer count once.
        macs: of all layers.
        bit_operations: sum over the layers of macs * weight bits * activation bits.
        sparsity: zeros among the prunable weights, as a fraction: those of the convolutions, or of the fully connected
            layers where the network has no convolution.
        masked: those of the same weights that lie under a mask, as a fraction.
        layers: what has macs, or a weight that is prunable somewhere.
        uncounted: operators that multiply and are in no number here, each with its place: `aten._fft_r2c in blocks.0`.
            Elementwise operators, normalisation, pooling and resizing are not counted by convention.
    """

    parameters: int
    macs: int
    bit_operations: int
    sparsity: float
    masked: float
    layers: tuple[LayerCosts, ...]
    uncounted: tuple[str, ...] = ()


def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Percent of the images that `model`, in eval mode, gives their label to.

    Raises:
        InputError: a batch has no labels, or there is no image.
    """
    correct = images = 0
    for batch, answers in _answers(model, batches):
        if batch.labels is None:
            raise InputError("accuracy cannot be measured on images without labels. Give labelled batches.")
        correct += int((answers == batch.labels.cpu()).sum())
        images += len(answers)
    if not images:
        raise InputError("accuracy cannot be measured on no images. Give at least one labelled batch.")
    return 100 * correct / images


def predictions(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """The classes (N,), int64 on the CPU, that `model` in eval mode gives to the images, in their order."""
    answers = [answers for _, answers in _answers(model, batches)]
    return torch.cat(answers) if answers else torch.empty(0, dtype=torch.int64)


def agreement(first: Tensor, second: Tensor) -> float:
    """Percent of the places where two lists of classes (N,) hold the same class; N is at least 1."""
    assert first.shape == second.shape, "answers to the same images"
    assert len(first), "percent of nothing"
    return 100 * (first == second).double().mean().item()


def costs(model: nn.Module, example: Tensor) -> Costs:
    """What `model` costs.

    Args:
        model: the network, plain or with masks and quantizers on it.
        example: images (N, C, H, W) as the network wants them; the first is run through the network.
    """
    ran = run_through(model, example[:1])
    macs, activation_bits = Counter[str](), dict[str, int]()
    for product in ran.products:
        name = product.module
        macs[name] += product.macs
        activation_bits[name] = max(activation_bits.get(name, 0), product.operands[0].bits or FLOAT_BITS)
    weighted = weighted_layers(model)
    layers = tuple(
        _layer_costs(name, module, macs[name], activation_bits.get(name, FLOAT_BITS))
        for name, module in model.named_modules()
        if macs[name] or name in weighted
    )
    counted = [*prunable(model).values()] if weighted else []
    return Costs(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=sum(layer.macs for layer in layers),
        bit_operations=sum(layer.macs * layer.weight_bits * layer.activation_bits for layer in layers),
        sparsity=_sparsity(layer.weight for layer in counted),
        masked=_sparsity(map(_mask, counted)),
        layers=layers,
        uncounted=ran.uncounted,
    )


def _answers(model: nn.Module, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch and the classes (N,) that `model` gives to its images, on the CPU."""
    device = _device(model)
    with evaluating(model):
        for batch in batches:
            with torch.inference_mode():  # not around the loop: it would reach what the caller does between batches
                answers = model(batch.images.to(device)).argmax(dim=1)
            yield batch, answers.cpu()


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


@torch.no_grad()
def _layer_costs(name: str, module: nn.Module, macs: int, activation_bits: int) -> LayerCosts:
    weight = getattr(module, "weight", None)  # as it is shown, under masks and quantizers
    weight = weight if isinstance(weight, Tensor) else None
    quantizer = weight_quantizer(module)
    learned = list(module.parameters(recurse=False))
    if parametrize.is_parametrized(module):
        learned += list(module.get_submodule("parametrizations").parameters())
    return LayerCosts(
        name=name,
        kind=parametrize.type_before_parametrizations(module).__name__,
        weight_shape=() if weight is None else tuple(weight.shape),
        macs=macs,
        parameters=sum(parameter.numel() for parameter in learned),
        sparsity=0.0 if weight is None else _sparsity([weight]),
        masked=0.0 if weight is None else _sparsity([_mask(module)]),
        weight_bits=quantizer.grid.bits if quantizer else FLOAT_BITS,
        activation_bits=activation_bits,
    )


def _mask(layer: nn.Module) -> Tensor:
    """Of the weight's shape, False where it is masked."""
    found = weight_mask(layer)
    if found is not None:
        return found.mask
    assert isinstance(layer.weight, Tensor)
    return torch.ones_like(layer.weight, dtype=torch.bool)


@torch.no_grad()
def _sparsity(weights: Iterable[Tensor]) -> float:
    zeros = numbers = 0
    for weight in weights:
        zeros += int((weight == 0).sum())
        numbers += weight.numel()
    return zeros / numbers if numbers else 0.0


def macs_ratio(network: nn.Module, original: nn.Module, example: Tensor, _target: Target) -> float:
    """The MACs of `network` divided by those of `original`: stands in for a latency ratio where nothing is measured."""
    return costs(network, example).macs / costs(original, example).macs
