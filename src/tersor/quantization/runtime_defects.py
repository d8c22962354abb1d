"""Layers that a runtime would compute incorrectly in integers.

OpenVINO, since 2026.0, loses the bias of an 8-bit convolution whose output is concatenated with a constant that is
expanded to the batch size, directly or after other operators. A ViT is built like this: patch embedding, then the
class token. Its accuracy fell from 61 to 47 %, and by as much in the 8-bit files of two other tools. With a static
batch, without a bias, or in float, the convolution is computed correctly.
"""

from __future__ import annotations

from torch import fx

from tersor.core.target import Runtime
from tersor.graph.aten import operator_name
from tersor.graph.batchnorm_behind import norm_behind
from tersor.graph.capture import layer_of, values_into
from tersor.graph.layer_selection import Convolution, Layer
from tersor.quantization.qdq_placement import CONCATENATIONS, quantizable


def correct_in_integers(graph: fx.GraphModule, runtime: Runtime) -> set[str]:
    """Names of the layers of a captured network that `runtime` computes in integers, and correctly."""
    known = quantizable(graph)
    return known - before_concatenated_constants(graph) if runtime == "openvino" else known


def before_concatenated_constants(graph: fx.GraphModule) -> set[str]:
    """Names of the convolutions with a bias whose outputs are concatenated with a constant."""
    constants: set[fx.Node] = set()
    found: set[str] = set()
    for node in graph.graph.nodes:
        values = values_into(node)
        if node.op == "get_attr" or (node.op == "call_function" and values and constants.issuperset(values)):
            constants.add(node)
        elif operator_name(node) in CONCATENATIONS and not constants.isdisjoint(values):
            found |= _nearest_convolutions([value for value in values if value not in constants])
    return found


def _nearest_convolutions(values: list[fx.Node]) -> set[str]:
    """Names of the last convolutions with a bias that the values depend on."""
    found: set[str] = set()
    seen: set[fx.Node] = set()
    while values:
        node = values.pop()
        if node in seen:
            continue
        seen.add(node)
        layer = layer_of(node)
        if not isinstance(layer, Layer):
            values += values_into(node)
        elif isinstance(layer, Convolution) and (layer.bias is not None or norm_behind(node) is not None):
            found.add(str(node.target))
    return found
