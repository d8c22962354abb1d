"""A network -> numbers: what it answers, and what it costs. Measuring leaves the network as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from tersor.core.errors import InputError
from tersor.core.evaluating import evaluating
from tersor.core.objective import Batch
from tersor.core.parametrization import FakeQuantize, weight_mask, weight_quantizer
from tersor.core.selection import prunable, weighted_layers

FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerCosts:
    """What one layer costs for one input.

    Attributes:
        name: its path in the network; empty for products that the network computes outside any layer.
        kind: its class, `Conv2d`.
        weight_shape: empty where it has no single weight.
        macs: multiplications that are added up: of convolutions, matrix products and attention.
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
    """

    parameters: int
    macs: int
    bit_operations: int
    sparsity: float
    masked: float
    layers: tuple[LayerCosts, ...]


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
    macs = _macs(model, example[:1])
    activation_bits = _activation_bits(model)
    weighted = weighted_layers(model)
    layers = tuple(
        _layer_costs(name, module, macs[module], activation_bits.get(name, FLOAT_BITS))
        for name, module in model.named_modules()
        if macs[module] or name in weighted
    )
    counted = [*prunable(model).values()] if weighted else []
    return Costs(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=sum(layer.macs for layer in layers),
        bit_operations=sum(layer.macs * layer.weight_bits * layer.activation_bits for layer in layers),
        sparsity=_sparsity(layer.weight for layer in counted),
        masked=_sparsity(map(_mask, counted)),
        layers=layers,
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


def _macs(model: nn.Module, example: Tensor) -> Counter[nn.Module]:
    """Module -> macs of what it computes itself, not within a module that it calls.

    FlopCounterMode's own table holds the sums of whole subtrees, along a hierarchy that a captured graph does not
    call through, so the total is read whenever a module is entered or left.
    """
    own: Counter[nn.Module] = Counter()
    running = [model]
    counted = 0
    counter = FlopCounterMode(display=False)

    def charge() -> None:
        nonlocal counted
        total = counter.get_total_flops() // 2
        own[running[-1]] += total - counted
        counted = total

    def enter(module: nn.Module, _inputs: object) -> None:
        charge()
        running.append(module)

    def leave(_module: nn.Module, _inputs: object, _output: object) -> None:
        charge()
        running.pop()

    hooks = [module.register_forward_pre_hook(enter) for module in model.modules()]
    hooks += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        with evaluating(model), _attention_in_parts(), _frozen(model), counter:
            model(example.to(_device(model)))
    finally:
        for hook in hooks:
            hook.remove()
    return own


@contextmanager
def _frozen(model: nn.Module) -> Generator[None]:
    """Nothing learns: where parameters could, the counter fails on what expands one without gradients, as CaiT does."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def _attention_in_parts() -> Generator[None]:
    """Attention computed as matrix products: the counter does not know the fused kernels of the CPU."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _activation_bits(model: nn.Module) -> dict[str, int]:
    """Bits of the input by the layer's name, in a captured graph; the most where a layer is called several times."""
    bits: dict[str, int] = {}
    if isinstance(model, fx.GraphModule):
        for node in model.graph.nodes:
            if node.op == "call_module" and node.all_input_nodes:
                name = str(node.target)
                bits[name] = max(bits.get(name, 0), _bits_of(model, node.all_input_nodes[0]))
    return bits


def _bits_of(graph: fx.GraphModule, value: fx.Node) -> int:
    """Bits of what a node gives."""
    quantizer = graph.get_submodule(str(value.target)) if value.op == "call_module" else None
    return quantizer.grid.bits if isinstance(quantizer, FakeQuantize) and quantizer.ready else FLOAT_BITS


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
