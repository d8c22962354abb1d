"""Circular padding as slices: OpenVINO does not support ONNX's Pad operator with `mode="wrap"`."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import helper, numpy_helper

_END = 2**63 - 1


def write_as_slices(graph: onnx.GraphProto) -> None:
    """Replace each circular Pad by a concatenation of the input with slices of it, one axis after the other."""
    constants = {
        each.name: numpy_helper.to_array(each).tolist()
        for each in graph.initializer
        if each.data_type == onnx.TensorProto.INT64
    }
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        mode = next((helper.get_attribute_value(each) for each in node.attribute if each.name == "mode"), b"constant")
        if node.op_type != "Pad" or mode != b"wrap" or node.input[1] not in constants:
            graph.node.append(node)
            continue
        sizes = constants[node.input[1]]
        rank = len(sizes) // 2
        padded = [(axis, sizes[axis], sizes[rank + axis]) for axis in range(rank) if sizes[axis] or sizes[rank + axis]]
        value = node.input[0]
        for number, (axis, before, after) in enumerate(padded, 1):
            name = node.output[0] if number == len(padded) else f"{node.output[0]}_axis{axis}"
            graph.node.extend(_concatenated(graph, value, name, axis, before, after))
            value = name


def _concatenated(
    graph: onnx.GraphProto, value: str, name: str, axis: int, before: int, after: int
) -> Iterator[onnx.NodeProto]:
    """The nodes that put the last `before` and the first `after` values of an axis around it."""
    parts = [value]
    if before:
        parts.insert(0, f"{name}_end")
        yield _slice(graph, value, parts[0], -before, _END, axis)
    if after:
        parts.append(f"{name}_start")
        yield _slice(graph, value, parts[-1], 0, after, axis)
    yield helper.make_node("Concat", parts, [name], name, axis=axis)


def _slice(graph: onnx.GraphProto, value: str, name: str, start: int, end: int, axis: int) -> onnx.NodeProto:
    arguments: list[str] = []
    for key, number in (("from", start), ("to", end), ("axis", axis)):
        arguments.append(f"{name}_{key}")
        graph.initializer.append(helper.make_tensor(arguments[-1], onnx.TensorProto.INT64, [1], [number]))
    return helper.make_node("Slice", [value, *arguments], [name], name)
