"""Attention and einsum written as matrix products, whose operands can be quantized.

    scaled_dot_product_attention(q, k, v)    ->    softmax(q @ k.transpose(-2, -1) * scale + mask) @ v

The fused operator shows neither the scores nor their softmax. The ONNX exporter decomposes it in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tersor.graph.aten import arguments, dtype_of, operator_name, shape_of, with_shape

_aten = torch.ops.aten


def write_as_matrix_products(graph: fx.GraphModule) -> None:
    """Replace attention and einsum over two activations in a captured network by matrix products, in place.

    Attention with a boolean mask stays: for a row without True, the fused operator returns zeros, softmax returns NaN.
    """
    for node in list(graph.graph.nodes):
        rule = {"scaled_dot_product_attention": _attention, "einsum": _einsum}.get(operator_name(node))
        if rule is None or (result := rule(node)) is None:
            continue
        node.replace_all_uses_with(result)
        graph.graph.erase_node(node)
        outputs: dict[str, str] = graph.meta["layers"]
        outputs.update({path: result.name for path, name in outputs.items() if name == node.name})
    graph.recompile()


def _attention(node: fx.Node) -> fx.Node | None:
    given = arguments(node)
    mask = given["attn_mask"]
    if (
        given["dropout_p"]
        or given["is_causal"]
        or given["enable_gqa"]
        or (mask is not None and dtype_of(mask) == torch.bool)
    ):
        return None
    query, key, value = given["query"], given["key"], given["value"]
    (*batch, rows, width), columns = shape_of(query), shape_of(key)[-2]
    scale = given["scale"] if given["scale"] is not None else width**-0.5
    add, shape = OperatorAdder(node), (*batch, rows, columns)
    transposed = add((*batch, width, columns), _aten.transpose.int, key, -2, -1)
    scores = add(shape, _aten.mul.Tensor, add(shape, _aten.matmul.default, query, transposed), scale)
    if mask is not None:
        scores = add(shape, _aten.add.Tensor, scores, mask)
    return add(shape_of(node), _aten.matmul.default, add(shape, _aten.softmax.int, scores, -1), value)


def _einsum(node: fx.Node) -> fx.Node | None:
    """The product of two activations over their shared dimensions; None if this is not a single matrix product."""
    given = arguments(node)
    equation, operands = given["equation"].replace(" ", ""), given["tensors"]
    inputs, _, output = equation.partition("->")
    subscripts = inputs.split(",")
    if len(operands) != 2 or "." in equation or any(len({*each}) != len(each) for each in (*subscripts, output)):
        return None
    if any(each.op == "get_attr" for each in operands):
        return None
    left, right = subscripts
    batch = [each for each in output if each in left and each in right]
    contracted = [each for each in left if each in right and each not in output]
    rows = [each for each in left if each not in right]
    columns = [each for each in right if each not in left]
    if len(contracted) != 1 or len(rows) != 1 or len(columns) != 1 or {*output} != {*batch, *rows, *columns}:
        return None
    add = OperatorAdder(node)
    first = _permuted(add, operands[0], left, [*batch, *rows, *contracted])
    second = _permuted(add, operands[1], right, [*batch, *contracted, *columns])
    shape = (*shape_of(first)[:-1], shape_of(second)[-1])
    product = add(shape, _aten.matmul.default, first, second)
    return _permuted(add, product, [*batch, *rows, *columns], output)


def _permuted(add: OperatorAdder, value: fx.Node, given: Sequence[str], wanted: Sequence[str]) -> fx.Node:
    order = [list(given).index(each) for each in wanted]
    if order == sorted(order):
        return value
    shape = tuple(shape_of(value)[place] for place in order)
    return add(shape, _aten.permute.default, value, order)


class OperatorAdder:
    """Adds operators before `node`, in its module."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    def __call__(self, shape: tuple[Any, ...], operator: Any, *operands: Any) -> fx.Node:
        with self.node.graph.inserting_before(self.node):
            added = self.node.graph.call_function(operator, operands)
        added.meta = with_shape(self.node.meta, shape)
        return added
