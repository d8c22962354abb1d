"""Separate transposes: each matrix product of an ONNX graph reads its own DequantizeLinear and Transpose of a weight.

A fully connected layer that is called several times on tokens (N, T, C) reads one transposed weight, because the
exporter merges equal nodes. ONNX Runtime then computes the products in float: it finds an integer operator only where a
dequantized weight has one reader. Copies of the two nodes read the same stored weight, so the file hardly grows.
"""

from __future__ import annotations

from collections import Counter

import onnx


def separate_transposes(graph: onnx.GraphProto) -> None:
    """Copy the Transpose of a dequantized weight for each further MatMul that reads it, in place."""
    makers = {output: node for node in graph.node for output in node.output}
    readers = Counter[str]()
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        transpose = makers.get(node.input[1]) if node.op_type == "MatMul" else None
        weight = makers.get(transpose.input[0]) if transpose is not None and transpose.op_type == "Transpose" else None
        if transpose is not None and weight is not None and weight.op_type == "DequantizeLinear":
            readers[transpose.output[0]] += 1
            if readers[transpose.output[0]] > 1:
                copies = _copied(weight, transpose, f"_{readers[transpose.output[0]]}")
                graph.node.extend(copies)
                node.input[1] = copies[1].output[0]
        graph.node.append(node)


def _copied(weight: onnx.NodeProto, transpose: onnx.NodeProto, suffix: str) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """Copies of both nodes, with other names of their outputs."""
    copies = onnx.NodeProto(), onnx.NodeProto()
    for copy, node in zip(copies, (weight, transpose), strict=True):
        copy.CopyFrom(node)
        copy.name = f"{node.name}{suffix}" if node.name else ""
        copy.output[0] = f"{node.output[0]}{suffix}"
    copies[1].input[0] = copies[0].output[0]
    return copies
