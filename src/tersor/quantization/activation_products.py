"""Products of two activations, as in attention, and which of them a runtime computes faster in integers."""

from __future__ import annotations

from torch import fx

from tersor.core.target import Target
from tersor.graph.aten import operator_name, place_of, shape_of
from tersor.graph.capture import values_into

_PRODUCTS = {"matmul", "bmm"}
_SMALLEST = 32
"""Smallest size of matrices for which ONNX Runtime saves more time by multiplying integers than rounding takes.

Attention alone, at 49 to 400 positions on a processor with VNNI: 0.81 to 1.0 times the time of float at head widths of
32 and 64, 0.97 to 1.04 at 24, 1.03 and more at 16; `docs/decisions/0067` has the figures.
"""


def matrix_products(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """The products of two matrices that both depend on the images, by module and name (`blocks.0.attn.matmul_1`)."""
    depending: set[fx.Node] = set()
    found: dict[str, fx.Node] = {}
    for node in graph.graph.nodes:
        operands = values_into(node)
        if node.op != "placeholder" and depending.isdisjoint(operands):
            continue
        depending.add(node)
        if operator_name(node) in _PRODUCTS and len(operands) == 2 and depending.issuperset(operands):
            found[f"{place_of(node)}.{node.name}".lstrip(".")] = node
    return found


def products_faster_in_integers(graph: fx.GraphModule, target: Target) -> list[str]:
    """The names of the products that `target` computes faster from rounded operands."""
    if target.runtime != "onnxruntime" or target.cpu != "vnni":
        return []
    return [name for name, node in matrix_products(graph).items() if _is_large(node)]


def _is_large(product: fx.Node) -> bool:
    first, second = map(shape_of, values_into(product))
    return all(not isinstance(size, int) or size >= _SMALLEST for size in (*first[-2:], second[-1]))
