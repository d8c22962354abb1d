"""The integer graph: a quantized network with QuantizeLinear/DequantizeLinear, int8 weights and folded BatchNorm.

Where quantizers were placed in training (`quantization/qdq_placement.py`), the file gets Q/DQ pairs. Weights w =
s (q - z) are stored as q - z where that fits into int8, as it does up to 7 bits: the stored weights are then symmetric.
With zero points that are not zero OpenVINO computes the layer in float, and ONNX Runtime before 1.27 refuses it at the
first batch unless all channels share one.
"""

from __future__ import annotations

import copy
from collections.abc import Container
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tersor.graph.batchnorm import Norm, gamma_and_beta
from tersor.graph.batchnorm_behind import norm_behind
from tersor.graph.capture import layer_of, values_into
from tersor.graph.layer_selection import Convolution, Layer
from tersor.graph.parametrization import strip
from tersor.graph.plain_modules import is_plain
from tersor.quantization.fake_quantize import FakeQuantize, weight_quantizer
from tersor.quantization.grid import Grid
from tersor.quantization.qdq_placement import is_nothing_in_eval

_LARGEST_BIAS = 2**30  # the accumulated products need the rest of 32 bits
_TINY = 1e-20


class QuantizeDequantize(nn.Module):
    """A quantized activation: the Q/DQ pair that runtimes fuse."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: FakeQuantize) -> None:
        super().__init__()
        self.register_buffer("scale", quantizer.scale.detach().clone())
        self.register_buffer("zero_point", quantizer.zero_point.to(torch.uint8))
        grid = quantizer.grid
        self.ends = None if grid == Grid.unsigned(8) else (grid.minimum, grid.maximum)

    def forward(self, values: Tensor) -> Tensor:
        """`values` of any shape, float32."""
        grid = [self.scale, self.zero_point]
        quantized = torch.onnx.ops.symbolic(
            "QuantizeLinear", [values, *grid], dtype=torch.uint8, shape=values.shape, version=21
        )
        if self.ends is not None:  # a clip before the pair would keep the layer in float
            quantized = quantized.clamp(*self.ends)
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", [quantized, *grid], dtype=torch.float32, shape=values.shape, version=21
        )


class IntegerLayer(nn.Module):
    """A convolution or fully connected layer with an int8 weight and an int32 bias.

    The bias of a fully connected layer whose inputs have more than two dimensions stays in float: ONNX writes it as an
    addition after the matrix product, so it is not part of an integer kernel.

    Args:
        layer: the layer without quantizers; its settings are used.
        weight: integers (C_out, ...), int8.
        scale: scale of the weight, (C_out,).
        zero_point: zero point of the weight, (C_out,) int8; None where it is zero.
        bias: (C_out,) in float, or None.
        input_scale: scale of the input activations, a scalar; None where they are float.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    integer_bias: Tensor | None
    bias_scale: Tensor | None

    def __init__(
        self,
        layer: Layer,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bias: Tensor | None,
        input_scale: Tensor | None,
    ) -> None:
        super().__init__()
        for name, child in layer.named_children():  # such as a padding, which the graph calls by its path
            self.add_module(name, child)
        self.layer = copy.copy(layer)
        self.layer._parameters = {"weight": None, "bias": None}
        if _pads_with_values(layer):  # `_pad_before` does that
            vars(self.layer).update(padding_mode="zeros", padding=(0,) * (layer.weight.ndim - 2))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        if zero_point is None and isinstance(layer, nn.Linear):
            # ONNX Runtime computes a matrix product in integers only if its weight has a zero point, even 0
            zero_point = torch.zeros_like(weight[:, 0])
        self.register_buffer("zero_point", zero_point)
        integers, bias_scale = None, None
        if bias is not None and input_scale is not None:
            bias_scale = scale * input_scale
            integers = torch.round(bias / bias_scale).to(torch.int32)
        self.register_buffer("bias", bias)
        self.register_buffer("integer_bias", integers)
        self.register_buffer("bias_scale", bias_scale)

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's output from its dequantized weight and bias."""
        weight = _dequantize(self.weight, self.scale, self.zero_point)
        bias, convolution = self.bias, isinstance(self.layer, Convolution)
        if self.integer_bias is not None and self.bias_scale is not None and (convolution or inputs.ndim == 2):
            bias = _dequantize(self.integer_bias, self.bias_scale)
        if isinstance(self.layer, Convolution):
            return self.layer._conv_forward(inputs, weight, bias)  # pyright: ignore[reportPrivateUsage]
        return F.linear(inputs, weight, bias)


def _dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Integers (C, ...) with scales (C,), as one DequantizeLinear."""
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        [integers, scale] if zero_point is None else [integers, scale, zero_point],
        attrs={"axis": 0},
        dtype=torch.float32,
        shape=integers.shape,
        version=21,
    )


def to_integer_graph(model: fx.GraphModule) -> nn.Module:
    """A copy of `model` for the ONNX exporter; it can be traced, but runs only as ONNX."""
    if not any(isinstance(module, FakeQuantize) and module.enabled for module in model.modules()):
        return strip(model)
    plain = strip(model)
    graph = copy.deepcopy(model.graph)
    graph.owning_module = model
    modules: dict[str, nn.Module] = {}
    targets: dict[fx.Node, str] = {}
    folded: list[fx.Node] = []
    for node in graph.nodes:
        module, name = layer_of(node), str(node.target)
        if isinstance(module, FakeQuantize):
            modules[name] = QuantizeDequantize(module) if module.enabled else nn.Identity()
            node.kwargs = {}
        elif isinstance(module, Layer) and is_plain(module) and weight_quantizer(module) is not None:
            norm = norm_behind(node)
            if norm is not None:
                folded.append(norm.node)
            layer = _integer_layer(module, plain.get_submodule(name), norm and norm.module, _input_scale(node))
            targets[node] = _add_call(modules, name, layer)
            if _pads_with_values(module):
                _pad_before(node, module)
    for node in folded:
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)
    for node, target in targets.items():
        node.target = target
    _keep_read_tensors(plain, graph, modules)
    for name, module in modules.items():
        plain.set_submodule(name, module)
    return fx.GraphModule(plain, graph, class_name=type(model).__name__)


def _add_call(modules: dict[str, nn.Module], name: str, layer: IntegerLayer) -> str:
    """Add the integer layer of a further call of layer `name`, and return its name.

    Each call has an input scale of its own, and may have a BatchNorm of its own. Equal weights are stored once.
    """
    number = 1 + sum(each == name or each.rpartition(".")[0] == name for each in modules)
    first = modules.get(name)
    if isinstance(first, IntegerLayer) and torch.equal(first.weight, layer.weight):
        layer.weight = first.weight
    target = name if number == 1 else f"{name}.{number}"
    modules[target] = layer
    return target


def _pads_with_values(layer: nn.Module) -> bool:
    """Whether `layer` is a convolution that pads with values of its input (`reflect`, `replicate`, `circular`)."""
    return isinstance(layer, Convolution) and layer.padding_mode != "zeros"


def _pad_before(node: fx.Node, layer: nn.Module) -> None:
    """Pad in front of a convolution and quantize again, because runtimes look for Q/DQ directly before it.

    Rounding to the same grid twice changes nothing.
    """
    assert isinstance(layer, Convolution)
    value = values_into(node)[0]
    sizes: list[int] = layer._reversed_padding_repeated_twice  # pyright: ignore[reportPrivateUsage]
    quantizer = _input_quantizer(node)
    with node.graph.inserting_before(node):
        padded = node.graph.call_function(F.pad, (value, sizes), {"mode": layer.padding_mode})
        if quantizer is not None:
            padded = node.graph.call_module(cast("str", quantizer.target), (padded,))
    node.replace_input_with(value, padded)


def _keep_read_tensors(plain: nn.Module, graph: fx.Graph, replaced: Container[str]) -> None:
    """Keep float copies of those tensors of replaced layers that the forward method reads directly.

    It may read the values of a shared weight, or only a dtype (`x.to(self.conv.weight.dtype)`).
    """
    for node in graph.nodes:
        owner, _, name = str(node.target).rpartition(".")
        if node.op == "get_attr" and owner in replaced:
            kept = f"read_{owner.replace('.', '_')}_{name}"
            while hasattr(plain, kept):
                kept += "_"
            plain.register_buffer(kept, getattr(plain.get_submodule(owner), name).detach().clone())
            node.target = kept


def _input_quantizer(node: fx.Node) -> fx.Node | None:
    """The enabled quantizer in front of a layer."""
    value = values_into(node)[0]
    while is_nothing_in_eval(value):
        value = values_into(value)[0]
    quantizer = layer_of(value)
    return value if isinstance(quantizer, FakeQuantize) and quantizer.enabled else None


def _input_scale(node: fx.Node) -> Tensor | None:
    value = _input_quantizer(node)
    return None if value is None else cast("FakeQuantize", layer_of(value)).scale.detach()


@torch.no_grad()
def _integer_layer(layer: Layer, plain: nn.Module, norm: Norm | None, input_scale: Tensor | None) -> IntegerLayer:
    """The integer layer; `norm` is folded into scale, sign and bias, so that magnitudes of integers do not change."""
    quantizer = weight_quantizer(layer)
    assert quantizer is not None
    assert isinstance(plain, Layer)
    shape = (-1, *[1] * (layer.weight.ndim - 1))
    scale = quantizer.scale.detach().expand(layer.weight.shape[0])
    zero_point = quantizer.zero_point.expand_as(scale)
    integers = torch.round(layer.weight / scale.reshape(shape))
    bias = layer.bias
    if norm is not None:
        factor, bias = _fold(norm, bias)
        integers = integers * torch.sign(factor).reshape(shape)
        zero_point = torch.where(factor < 0, -1 - zero_point, zero_point)  # -(q - z) = (-1 - q) - (-1 - z)
        scale = scale * factor.abs()
    if bias is not None and not bias.any():
        bias = None  # saves its scales in the file
    safe_scale = _bias_safe_scale(integers, scale, bias, input_scale)
    integers = torch.round(integers * (scale / safe_scale).reshape(shape))
    stored, zero_point = _to_int8(integers, zero_point)
    return IntegerLayer(plain, stored, safe_scale, zero_point, bias, input_scale)


def _to_int8(integers: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor | None]:
    """q - z (C, ...) as int8 and None, or q and z (C,) where q - z does not fit; `integers` are q - z."""
    if _fits_int8(integers):
        return integers.to(torch.int8), None
    stored = integers + zero_point.reshape(-1, *[1] * (integers.ndim - 1))
    assert _fits_int8(stored)
    return stored.to(torch.int8), zero_point.to(torch.int8)


def _fits_int8(integers: Tensor) -> bool:
    return bool(integers.min() >= -128 and integers.max() <= 127)


def _bias_safe_scale(integers: Tensor, scale: Tensor, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:
    """`scale` (C,), adapted for channels whose weights are zero or tiny.

    Where all integers are zero, the scale follows from the bias. Where the bias would overflow beside tiny weights, the
    scale is raised. A channel without weights and bias gets 1.
    """
    silent = integers.flatten(1).eq(0).all(1)
    scale = torch.where(silent, torch.zeros_like(scale), scale)
    if bias is not None and input_scale is not None:
        scale = torch.maximum(scale, bias.abs() / (_LARGEST_BIAS * input_scale))
    return torch.where(scale > _TINY, scale, torch.ones_like(scale))


def _fold(norm: Norm, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factor of each channel, and the new bias."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = torch.rsqrt(norm.running_var + norm.eps)
    gamma, beta = gamma_and_beta(norm)
    if gamma is not None:
        factor = factor * gamma
    centered = -norm.running_mean if bias is None else bias - norm.running_mean
    return factor, centered * factor + (0 if beta is None else beta)
