"""The convolutions and matrix products of a model file: names, output channels and stored bits of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tersor.deploy.onnx_file import read_onnx

_PASSED = {"DequantizeLinear", "Cast", "Transpose"}
_BITS = {"INT8": 8, "UINT8": 8, "INT4": 4, "UINT4": 4, "FLOAT16": 16, "BFLOAT16": 16}
_WEIGHT_INPUT = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}
_FLOAT_PRODUCTS = {"Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "LSTM", "MatMul", "RNN"}
_SAME_NUMBERS = {
    *("Cast", "Flatten", "Gather", "Identity", "MaxPool"),
    *("Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
}
FLOAT_BITS = 32
MOST_BITS = 8
"""Largest bit width of a quantized weight."""
_OPENVINO_INTEGERS = {"i4": 4, "u4": 4, "i8": 8, "u8": 8}


@dataclass(frozen=True)
class FileLayer:
    """A layer of a file.

    Attributes:
        name: name of its node, which is the path of the module; if the node has no name, the name of its output.
        channels: number of output channels.
        bits: bits of a stored weight.
    """

    name: str
    channels: int
    bits: int


def file_layers(path: Path) -> list[FileLayer]:
    """The layers with a stored weight, in the order of execution.

    Args:
        path: an ONNX file written by `deploy/onnx.py`, or with the integer operators of ONNX Runtime's quantization.
    """
    import onnx  # here, because it is slow to import

    graph = read_onnx(path).graph
    weights = {each.name: each for each in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    layers: list[FileLayer] = []
    for node in graph.node:
        axis = _channel_axis(node)
        if axis is None:
            continue
        weight, transposed = _stored(node.input[_WEIGHT_INPUT.get(node.op_type, 1)], weights, makers)
        if weight is not None:
            axis = -1 - axis if transposed else axis
            bits = _BITS.get(onnx.TensorProto.DataType.Name(weight.data_type), FLOAT_BITS)
            layers.append(FileLayer(node.name or node.output[0], weight.dims[axis], bits))
    return layers


def weight_bits(path: Path) -> tuple[int, ...]:
    """The stored bits of quantized weights, sorted; empty for a float file.

    Args:
        path: an `.onnx` file, or OpenVINO's `.xml`, where every integer constant of at most 8 bits is a weight.
    """
    if path.suffix == ".xml":
        constants = [layer.find("data") for layer in ElementTree.parse(path).iter("layer")]  # noqa: S314  # opened before
        types = {data.get("element_type", "") for data in constants if data is not None}
        return tuple(sorted({_OPENVINO_INTEGERS[each] for each in types & set(_OPENVINO_INTEGERS)}))
    return tuple(sorted({layer.bits for layer in file_layers(path) if layer.bits <= MOST_BITS}))


def stored_precision(path: Path, executed: str) -> str:
    """ "int8", "int4 and int8, rest float32", or for a float file the precision that is `executed`.

    "rest ..." is left out if both operands of every product are quantized. For an OpenVINO file it is always included,
    because its products are not read.
    """
    bits = weight_bits(path)
    if not bits:
        return executed
    stored = " and ".join(f"int{each}" for each in bits)
    return stored if path.suffix == ".onnx" and _all_in_integers(path) else f"{stored}, rest {executed}"


def _all_in_integers(path: Path) -> bool:
    """Whether both operands of every product of an ONNX file are quantized; false for a file with subgraphs."""
    graph = read_onnx(path).graph
    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return False
    makers = {output: node for node in graph.node for output in node.output}
    operands = [value for node in graph.node if node.op_type in _FLOAT_PRODUCTS for value in node.input[:2]]
    return all(_is_quantized(value, makers) for value in operands)


def _is_quantized(value: str, makers: Mapping[str, Any]) -> bool:
    """Whether a value is dequantized, and its numbers are unchanged since."""
    while value in makers and makers[value].op_type in _SAME_NUMBERS:
        value = makers[value].input[0]
    return value in makers and makers[value].op_type == "DequantizeLinear"


def _channel_axis(node: Any) -> int | None:
    """The axis of the output channels in the weight; None for other operators."""
    match node.op_type:
        case "Conv" | "QLinearConv" | "ConvInteger":
            return 0
        case "ConvTranspose":
            return 1
        case "Gemm" | "QGemm":
            transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            return 0 if transposed else 1
        case "MatMul" | "QLinearMatMul" | "MatMulInteger":
            return -1
        case _:
            return None


def _stored(value: str, weights: Mapping[str, Any], makers: Mapping[str, Any]) -> tuple[Any, bool]:
    """The stored tensor that a weight is computed from, or None; and whether it is transposed."""
    transposed = False
    while value not in weights and value in makers and makers[value].op_type in _PASSED:
        transposed ^= makers[value].op_type == "Transpose"
        value = makers[value].input[0]
    return weights.get(value), transposed
