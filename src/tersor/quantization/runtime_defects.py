"""Layers that a runtime would compute incorrectly in integers.

OpenVINO, since 2026.0, loses the bias of an 8-bit convolution whose output is concatenated with a constant that is
expanded to the batch size, directly or after other operators. A ViT is built like this: patch embedding, then the
class token. Its accuracy fell from 61 to 47 %, and by as much in the 8-bit files of two other tools. With a static
batch, without a bias, or in float, the convolution is computed correctly.

OpenVINO 2026.4 also computes a maximum over positions or channels (ReduceMax, not MaxPool) incorrectly if its output is
quantized: the attention of CBAM, for example. So the layers that read such a maximum stay in float.
"""

from __future__ import annotations

from torch import fx, nn

from tersor.core.target import Runtime
from tersor.graph.aten import operator_name
from tersor.graph.batchnorm_behind import norm_behind
from tersor.graph.capture import is_size, layer_of, values_into
from tersor.graph.layer_selection import Convolution, Layer
from tersor.quantization.qdq_placement import CONCATENATIONS, quantizable

_MAXIMA = {"amax", "amin", "max", "min", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"}
_NEW = {"new_zeros", "new_ones", "new_full"}
"""Operators that take only the data type of their input; `zeros` and others have no input."""


def correct_in_integers(graph: fx.GraphModule, runtime: Runtime) -> set[str]:
    """Names of the layers of a captured network that `runtime` computes in integers, and correctly."""
    known = quantizable(graph)
    return known - before_concatenated_constants(graph) - after_maxima(graph) if runtime == "openvino" else known


def defect_of(graph: fx.GraphModule, name: str, runtime: Runtime | None) -> str | None:
    """Why `runtime` computes a layer incorrectly in integers; None if it does not."""
    if runtime != "openvino":
        return None
    if name in before_concatenated_constants(graph):
        return "OpenVINO loses the bias of a convolution before a concatenation with a constant"
    if name in after_maxima(graph):
        return "OpenVINO computes a quantized maximum over positions or channels incorrectly"
    return None


def after_maxima(graph: fx.GraphModule) -> set[str]:
    """Names of the layers that read a maximum or minimum over positions or channels."""
    maxima: set[fx.Node] = set()
    found: set[str] = set()
    for node in graph.graph.nodes:
        values, layer = values_into(node), layer_of(node)
        reads = not maxima.isdisjoint(values)
        if isinstance(layer, Layer):
            found |= {str(node.target)} if reads else set()
        elif _is_maximum(node) or (reads and (len(values) == 1 or operator_name(node) in CONCATENATIONS)):
            maxima.add(node)
    return found


def _is_maximum(node: fx.Node) -> bool:
    module = layer_of(node)
    if isinstance(module, nn.modules.pooling._AdaptiveMaxPoolNd):  # pyright: ignore[reportPrivateUsage]
        return True
    return operator_name(node) in _MAXIMA and len(values_into(node)) == 1


def before_concatenated_constants(graph: fx.GraphModule) -> set[str]:
    """Names of the convolutions with a bias whose outputs are concatenated with a constant."""
    constants: set[fx.Node] = set()
    found: set[str] = set()
    for node in graph.graph.nodes:
        values = values_into(node)
        computed_from_constants = node.op == "call_function" and not is_size(node) and constants.issuperset(values)
        if node.op == "get_attr" or computed_from_constants or operator_name(node) in _NEW:
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
