"""Mask packing: a float mask that an Add reads (in Swin, of 0 and -100) is stored as INT8 multiples of its step.

A Cast and a Mul restore it. Runtimes fold both when they load the file, so inference takes the same time.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

_ELEMENTS = 256
"""In smaller masks the two nodes take as much space as they save."""
_LARGEST = 127


def pack_masks(graph: onnx.GraphProto) -> None:
    """Pack every float32 input of an Add whose elements are INT8 multiples of its smallest magnitude.

    No value changes.
    """
    added = {name for node in graph.node if node.op_type == "Add" for name in node.input}
    unpacking: list[onnx.NodeProto] = []
    for tensor in list(graph.initializer):
        if tensor.name not in added or tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < _ELEMENTS:
            continue
        mask = numpy_helper.to_array(tensor)
        step = _step(mask)
        with np.errstate(over="ignore"):  # a step near the smallest number
            multiples = np.rint(mask / step)
        if not (np.abs(multiples) <= _LARGEST).all() or not (multiples.astype(np.float32) * step == mask).all():
            continue
        name, cast = tensor.name, f"{tensor.name}.cast"
        tensor.CopyFrom(numpy_helper.from_array(multiples.astype(np.int8), f"{name}.int8"))
        graph.initializer.append(numpy_helper.from_array(step, f"{name}.step"))
        unpacking.append(helper.make_node("Cast", [f"{name}.int8"], [cast], to=TensorProto.FLOAT))
        unpacking.append(helper.make_node("Mul", [cast, f"{name}.step"], [name]))
    nodes = [*unpacking, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _step(mask: NDArray[np.float32]) -> NDArray[np.float32]:
    magnitudes = np.abs(mask[(mask != 0) & np.isfinite(mask)])
    return np.asarray(magnitudes.min() if magnitudes.size else 1, np.float32)
