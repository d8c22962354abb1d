"""A captured, quantized network -> the same network as a runtime should see it: integers, Q/DQ, BatchNorm folded."""

from __future__ import annotations

import copy
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tersor.core.parametrization import FakeQuantize, strip, weight_quantizer
from tersor.core.selection import Layer
from tersor.graph.capture import layer_of, sole_user

_INT32 = torch.iinfo(torch.int32)


class QuantizeDequantize(nn.Module):
    """An activation rounded to its grid, as the two operators that runtimes fuse."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: FakeQuantize) -> None:
        super().__init__()
        self.register_buffer("scale", quantizer.scale.detach().clone())
        self.register_buffer("zero_point", quantizer.zero_point.to(torch.uint8))

    def forward(self, values: Tensor) -> Tensor:
        """`values` of any shape, float32."""
        grid = [self.scale, self.zero_point]
        quantized = torch.onnx.ops.symbolic(
            "QuantizeLinear", [values, *grid], dtype=torch.uint8, shape=values.shape, version=21
        )
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", [quantized, *grid], dtype=torch.float32, shape=values.shape, version=21
        )


class IntegerLayer(nn.Module):
    """A convolution or fully connected layer whose weight lies as int8, and whose bias as int32.

    Args:
        layer: the plain layer, BatchNorm not folded.
        weight: integers (C_out, ...), int8.
        scale: of the weight, (C_out,).
        bias: (C_out,) in float, or None.
        input_scale: scale of the activations that come in, a scalar; None where they come in float.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    bias_scale: Tensor | None

    def __init__(
        self, layer: Layer, weight: Tensor, scale: Tensor, bias: Tensor | None, input_scale: Tensor | None
    ) -> None:
        super().__init__()
        self.layer = copy.copy(layer)
        # only its settings are used; the tensors are the buffers below
        self.layer._parameters = {"weight": None, "bias": None}
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        bias_scale = None
        if bias is not None and input_scale is not None:
            bias_scale = scale * input_scale
            bias = torch.round(bias / bias_scale).clamp(_INT32.min, _INT32.max).to(torch.int32)
        self.register_buffer("bias", bias)
        self.register_buffer("bias_scale", bias_scale)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer gives for `inputs`, from its integers."""
        weight = _dequantize(self.weight, self.scale)
        bias = self.bias
        if bias is not None and self.bias_scale is not None:
            bias = _dequantize(bias, self.bias_scale)
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(inputs, weight, bias)  # pyright: ignore[reportPrivateUsage]  # with its padding mode
        return F.linear(inputs, weight, bias)


def _dequantize(integers: Tensor, scale: Tensor) -> Tensor:
    """Integers (C, ...) times their channel's scale (C,), as one operator of the file."""
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        [integers, scale],
        attrs={"axis": 0},
        dtype=torch.float32,
        shape=integers.shape,
        version=21,
    )


def deployed(model: fx.GraphModule) -> nn.Module:
    """A copy of `model` for conversion; `model` stays as it is. It traces, but computes only as ONNX."""
    if not any(isinstance(module, FakeQuantize) and module.ready for module in model.modules()):
        return strip(model)
    plain = strip(model)
    graph = copy.deepcopy(model.graph)
    graph.owning_module = model
    modules: dict[str, nn.Module] = {}
    folded: list[fx.Node] = []
    for node in graph.nodes:
        module = layer_of(node)
        if module is None:
            continue
        name = cast("str", node.target)
        if isinstance(module, FakeQuantize):
            modules[name] = QuantizeDequantize(module) if module.ready else nn.Identity()
        elif isinstance(module, Layer) and weight_quantizer(module) is not None:
            norm_node = sole_user(node)
            norm = layer_of(norm_node) if norm_node is not None else None
            norm = norm if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d) else None
            if norm is not None and norm_node is not None:
                folded.append(norm_node)
            modules[name] = _integer_layer(module, plain.get_submodule(name), norm, _input_scale(node))
    for node in folded:
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)
    for name, module in modules.items():
        plain.set_submodule(name, module)
    return fx.GraphModule(plain, graph, class_name=type(model).__name__)


def _input_scale(node: fx.Node) -> Tensor | None:
    quantizer = layer_of(node.all_input_nodes[0])
    return quantizer.scale.detach() if isinstance(quantizer, FakeQuantize) and quantizer.ready else None


@torch.no_grad()
def _integer_layer(
    layer: Layer, plain: nn.Module, norm: nn.BatchNorm2d | nn.BatchNorm1d | None, input_scale: Tensor | None
) -> nn.Module:
    """The layer's integers, with `norm` folded into scale, sign and bias: the integers' sizes do not change."""
    quantizer = weight_quantizer(layer)
    assert quantizer is not None
    assert isinstance(plain, Layer)
    shape = (-1, *[1] * (layer.weight.ndim - 1))
    scale = quantizer.scale.detach().expand(layer.weight.shape[0])
    integers = torch.round(layer.weight / scale.reshape(shape))
    bias = layer.bias
    if norm is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        factor = torch.rsqrt(norm.running_var + norm.eps) * (norm.weight if norm.affine else 1)
        shift = norm.bias if norm.affine else 0
        bias = shift + (-norm.running_mean if bias is None else bias - norm.running_mean) * factor
        integers = integers * torch.sign(factor).reshape(shape)
        scale = scale * factor.abs()
        scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    return IntegerLayer(plain, integers.to(torch.int8), scale, bias, input_scale)
