"""The convolutions and matrix products of an ONNX file: names, output channels and stored bits of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PASSED = {"DequantizeLinear", "Cast"}
_BITS = {"INT8": 8, "UINT8": 8, "INT4": 4, "UINT4": 4, "FLOAT16": 16, "BFLOAT16": 16}
FLOAT_BITS = 32


@dataclass(frozen=True)
class FileLayer:
    """A layer of a file.

    Attributes:
        name: name of its node, the path of its module; of an unnamed node, the name of its output.
        channels: number of output channels.
        bits: of a stored weight.
    """

    name: str
    channels: int
    bits: int


def file_layers(path: Path) -> list[FileLayer]:
    """The layers with a stored weight, in the order of execution.

    Args:
        path: a file of `deploy/onnx.py`.
    """
    import onnx  # here, because it is slow to import

    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {each.name: each for each in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    layers: list[FileLayer] = []
    for node in graph.node:
        axis = _channel_axis(node)
        weight = None if axis is None else _stored(node.input[1], weights, makers)
        if weight is not None and axis is not None:
            bits = _BITS.get(onnx.TensorProto.DataType.Name(weight.data_type), FLOAT_BITS)
            layers.append(FileLayer(node.name or node.output[0], weight.dims[axis], bits))
    return layers


def _channel_axis(node: Any) -> int | None:
    """The axis of the output channels in the weight; None for other operators."""
    match node.op_type:
        case "Conv":
            return 0
        case "ConvTranspose":
            return 1
        case "Gemm":
            transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            return 0 if transposed else 1
        case "MatMul":
            return -1
        case _:
            return None


def _stored(value: str, weights: Mapping[str, Any], makers: Mapping[str, Any]) -> Any:
    """The stored tensor that a weight is computed from, or None."""
    while value not in weights and value in makers and makers[value].op_type in _PASSED:
        value = makers[value].input[0]
    return weights.get(value)
