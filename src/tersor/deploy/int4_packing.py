"""Weights of up to four bits lie two in a byte, and are unpacked when a runtime opens the file.

ONNX has INT4 behind a DequantizeLinear for this, but ONNX Runtime computes such a layer in float. With a Cast to INT8
between the two, both runtimes fold the Cast when they open the file, and run the network with weights of 8 bits.
ONNX Runtime can since 1.23; OpenVINO was tried from 2025.3 on.

Weights of an affine grid of 4 bits are -15..15 without their zero point (see `deployed.py`): each channel is shifted
into -8..7, and an Add behind the Cast shifts it back.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

_MINIMUM, _MAXIMUM = -8, 7


def pack(graph: onnx.GraphProto) -> None:
    """Packs every int8 weight (C, ...) of `graph` whose channels each span 16 neighbouring integers at most.

    No value changes: it goes by the integers alone. A weight is what a DequantizeLinear takes.
    """
    weights = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    unpacking: list[onnx.NodeProto] = []
    for tensor in list(graph.initializer):
        if tensor.name not in weights or tensor.data_type != TensorProto.INT8:
            continue
        integers = numpy_helper.to_array(tensor).astype(np.int32)
        low, high = (end(integers, axis=tuple(range(1, integers.ndim)), keepdims=True) for end in (np.min, np.max))
        if (high - low > _MAXIMUM - _MINIMUM).any():
            continue
        shift = np.where((low >= _MINIMUM) & (high <= _MAXIMUM), 0, low - _MINIMUM)
        name = tensor.name
        packed = _nibbles(integers - shift)
        tensor.CopyFrom(
            TensorProto(name=f"{name}.int4", data_type=TensorProto.INT4, dims=integers.shape, raw_data=packed)
        )
        centred = f"{name}.centred" if shift.any() else name
        unpacking.append(helper.make_node("Cast", [f"{name}.int4"], [centred], to=TensorProto.INT8))
        if shift.any():
            graph.initializer.append(numpy_helper.from_array(shift.astype(np.int8), f"{name}.shift"))
            unpacking.append(helper.make_node("Add", [centred, f"{name}.shift"], [name]))
    nodes = [*unpacking, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _nibbles(integers: NDArray[np.int32]) -> bytes:
    """Integers -8..7 as ONNX lays them: the first of two in the lower half of a byte."""
    flat = integers.ravel()
    pairs = np.pad(flat, (0, flat.size % 2)).reshape(-1, 2) & 15
    return (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8).tobytes()
