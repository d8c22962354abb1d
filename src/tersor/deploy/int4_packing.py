"""INT4 packing: weights of up to four bits are stored two in a byte, and unpacked when a runtime loads the file.

ONNX Runtime computes a layer in float if its INT4 weight is the direct input of a DequantizeLinear. With a Cast to INT8
between the two, runtimes fold the Cast when they load the file, and run the network with 8-bit weights: ONNX Runtime
since 1.23, OpenVINO tested from 2025.3 on.

Affine 4-bit weights without their zero point are in -15..15 (see `integer_graph.py`): each channel is shifted into
-8..7, and an Add after the Cast shifts it back.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

_MINIMUM, _MAXIMUM = -8, 7


def pack_int4(graph: onnx.GraphProto) -> None:
    """Pack every int8 input (C, ...) of a DequantizeLinear whose channels each span at most 16 neighboring integers.

    No value changes.
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
    """Integers -8..7 in ONNX's layout: the first of two in the lower half of a byte."""
    flat = integers.ravel()
    pairs = np.pad(flat, (0, flat.size % 2)).reshape(-1, 2) & 15
    return (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8).tobytes()
