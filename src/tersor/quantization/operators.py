"""Records the multiplications of a forward pass: each convolution and matrix product with its module and operands.

`torch.utils.flop_counter` has the formulas. Its own mode shows neither the operands of an operator nor, in a captured
graph, its layer.
"""

from __future__ import annotations

from collections.abc import Generator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from tersor.data.network_inputs import NetworkInput, tensors_of
from tersor.graph.aten import place_of, writes_into_input
from tersor.graph.eval_mode import evaluating
from tersor.graph.forward_call import in_order, run
from tersor.graph.layer_selection import Layer
from tersor.graph.multiplications import FORMULAS, MULTIPLICANDS, multiplies_uncounted
from tersor.graph.plain_modules import has_plain_forward
from tersor.quantization.fake_quantize import FakeQuantize


@dataclass(frozen=True)
class Operand:
    """A tensor that is multiplied.

    Attributes:
        activation: whether it depends on the images.
        parameter: name of the Parameter that it is or is computed from; None for activations and constants.
        bits: bit width of its quantization grid; None if it is not quantized.
    """

    activation: bool = False
    parameter: str | None = None
    bits: int | None = None


@dataclass(frozen=True)
class Product:
    """One executed operator that multiplies.

    Attributes:
        module: name of the innermost running module; empty for the network itself.
        parent: name of the module around it.
        operator: torch's name, `aten.addmm`.
        macs: number of multiply-accumulate operations.
        operands: the multiplied tensors, the input of the layer first.
        node: node of the graph, for a captured network.
    """

    module: str
    parent: str
    operator: str
    macs: int
    operands: tuple[Operand, ...]
    node: fx.Node | None


@dataclass(frozen=True)
class Pass:
    """The multiplications of a forward pass.

    Attributes:
        products: the counted ones, in order.
        uncounted: operators that multiply and have no formula, such as `aten._fft_r2c in blocks.0`.
    """

    products: tuple[Product, ...]
    uncounted: tuple[str, ...]


def run_through(model: nn.Module, images: NetworkInput, *, planned: bool = False) -> Pass:
    """Run `model` in eval mode on `images` (N, C, H, W); the model stays unchanged.

    Args:
        model: the network, plain or with masks and quantizers.
        images: input of the network, on any device.
        planned: whether disabled quantizers count as enabled.
    """
    recorder = _Recorder(model, planned=planned)
    first = next(model.parameters(), None)
    images = images if first is None else images.to(first.device)
    recorder.origins.update((each, Operand(activation=True)) for each in tensors_of(images))
    with evaluating(model), _attention_in_parts(), torch.no_grad(), _hooked(model, recorder), recorder:
        if isinstance(model, fx.GraphModule):
            _ByNode(model, recorder).run(*in_order(model.graph, images))
        else:
            run(model, images)
    return Pass(tuple(recorder.products), tuple(dict.fromkeys(recorder.uncounted)))


@dataclass(frozen=True)
class _Running:
    name: str
    reads: Operand | None
    """Its input, for a layer with torch's own forward method, since padding in any mode does not change the grid."""


class _Recorder(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, *, planned: bool) -> None:
        super().__init__()
        self.planned = planned
        self.running = [_Running("", None), _Running("", None)]
        self.node: fx.Node | None = None
        self.products: list[Product] = []
        self.uncounted: list[str] = []
        self.origins: MutableMapping[Tensor, Operand] = WeakTensorKeyDictionary()
        for name, parameter in model.named_parameters():
            self.origins[parameter] = Operand(parameter=name)

    def origin(self, tensor: Tensor) -> Operand:
        return self.origins.get(tensor, Operand())

    def enter(self, module: nn.Module, inputs: tuple[Any, ...], *, name: str) -> None:
        plain = isinstance(module, Layer) and has_plain_forward(module) and inputs and isinstance(inputs[0], Tensor)
        self.running.append(_Running(name, self.origin(inputs[0]) if plain else None))

    def leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.running.pop()
        if isinstance(module, FakeQuantize) and (module.enabled or self.planned):
            self.origins[output] = replace(self.origin(inputs[0]), bits=module.grid.bits)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self._ran(func, func, args, kwargs, func(*args, **kwargs))
        if func._overloadpacket not in FORMULAS and func is not torch.ops.prim.device.default:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        return self._ran(func._overloadpacket, func, args, kwargs, func(*args, **kwargs))

    def _ran(self, packet: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Records the operator and the origin of its results; returns `output`."""
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        inputs = [self.origin(each) for each in tensors]
        results = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
        activation = any(each.activation for each in inputs)
        parameter = next((each.parameter for each in inputs if each.parameter), None)
        if packet in FORMULAS:
            self._count(packet, args, FORMULAS[packet](*args, **kwargs, out_val=output) // 2)
        elif any(each.is_floating_point() or each.is_complex() for each in tensors):
            with_weight = activation and parameter is not None
            if not isinstance(func, OpOverload) or multiplies_uncounted(func, with_weight=with_weight):
                self.uncounted.append(f"{packet} in {place_of(self.node) or self.running[-1].name or 'the network'}")
        bits = inputs[0].bits if inputs and _only_moves(func) else None
        if isinstance(func, OpOverload) and writes_into_input(func):
            self._forget_grids(tensors[0])
        for each in results:
            self.origins[each] = Operand(activation, None if activation else parameter, bits)
        return output

    def _forget_grids(self, written: Tensor) -> None:
        """`written` was changed in place, so that neither it nor its views are on a grid any more."""
        storage = written.untyped_storage().data_ptr()
        for each, origin in list(self.origins.items()):
            if origin.bits is not None and each.untyped_storage().data_ptr() == storage:
                self.origins[each] = replace(origin, bits=None)

    def _count(self, packet: Any, args: tuple[Any, ...], macs: int) -> None:
        multiplicands = [args[place] for place in MULTIPLICANDS.get(packet, (0, 1)) if place < len(args)]
        operands = [self.origin(each) for each in multiplicands if isinstance(each, Tensor)]
        operands.sort(key=lambda each: not each.activation)
        running, around = self.running[-1], self.running[-2]
        if running.reads is not None and operands[0].activation:
            operands[0] = running.reads
        self.products.append(Product(running.name, around.name, str(packet), macs, tuple(operands), self.node))


class _ByNode(fx.Interpreter):
    """Runs a graph, and sets the recorder's current node."""

    def __init__(self, graph: fx.GraphModule, recorder: _Recorder) -> None:
        super().__init__(graph)
        self.recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        self.recorder.node = n
        return super().run_node(n)


def _only_moves(func: Any) -> bool:
    return isinstance(func, OpOverload) and (
        func.is_view or torch.Tag.inplace_view in func.tags or str(func).split(".")[1] in {"clone", "_unsafe_view"}
    )


@contextmanager
def _hooked(model: nn.Module, recorder: _Recorder) -> Generator[None]:
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if module is not model:
                hooks.callback(module.register_forward_pre_hook(partial(recorder.enter, name=name)).remove)
                hooks.callback(module.register_forward_hook(recorder.leave).remove)
        yield


@contextmanager
def _attention_in_parts() -> Generator[None]:
    """Computes attention as matrix products, because there are no formulas for the fused CPU kernels."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
