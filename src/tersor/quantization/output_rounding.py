"""Which convolutions have their output rounded although it is an output of the network.

ONNX Runtime computes a convolution in integers only if its output is quantized, while a matrix product may return
float. Rounded logits have ties, so outputs stay in float by default, and with them the convolution. If it returns a
feature map and has a large share of the multiplications, as in a feature pyramid, its output is rounded instead.
"""

from __future__ import annotations

import math

from torch import fx

from tersor.core.target import Runtime
from tersor.graph.aten import shape_of
from tersor.graph.capture import layer_of
from tersor.graph.layer_selection import Convolution, Layer

_LARGE_SHARE = 0.05
"""Share of the multiplications of all layers; 95 % of the MACs in integers are enough."""


def rounds_its_output(convolution: fx.Node, runtime: Runtime) -> bool:
    """Whether a layer whose output is an output of the network gets a quantizer behind it.

    Args:
        convolution: the call of a layer in a captured network.
        runtime: the runtime that will execute the graph.
    """
    if runtime != "onnxruntime" or not isinstance(layer_of(convolution), Convolution):
        return False
    if set(shape_of(convolution)[2:]) == {1}:
        return False  # logits
    total = sum(map(_macs, convolution.graph.nodes))
    return _macs(convolution) > _LARGE_SHARE * total


def _macs(node: fx.Node) -> int:
    """Multiplications of a layer for one image; 0 for other nodes."""
    layer = layer_of(node)
    if not isinstance(layer, Layer):
        return 0
    places = shape_of(node)[2:] if isinstance(layer, Convolution) else shape_of(node)[1:-1]
    return layer.weight.numel() * math.prod(size for size in places if isinstance(size, int))
