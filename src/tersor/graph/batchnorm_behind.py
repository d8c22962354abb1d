"""The BatchNorm after a layer: a BatchNorm that is the only user of the layer's output.

A convolution has its channels along dimension 1, which BatchNorm normalizes. A fully connected layer has its features
along the last dimension, which is dimension 1 only for (N, F). For (N, T, F) a BatchNorm after it normalizes T and
cannot be folded, and where T == F only the rank of the layer's output shows the difference.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import fx, nn

from tersor.data.network_inputs import NetworkInput
from tersor.graph.batchnorm import Norm
from tersor.graph.capture import capture, layer_of, rank_of, sole_user
from tersor.graph.layer_selection import Layer
from tersor.graph.plain_modules import has_plain_forward, is_hooked, is_plain


class NormCall(NamedTuple):
    """A BatchNorm, and the node that calls it."""

    node: fx.Node
    module: Norm


def norm_reading(node: fx.Node) -> NormCall | None:
    """The BatchNorm that is the only user of `node`, with running statistics and torch's `forward`; hooks allowed."""
    reader = sole_user(node)
    norm = None if reader is None else layer_of(reader)
    if reader is None or not isinstance(norm, Norm) or norm.running_mean is None or not has_plain_forward(norm):
        return None
    return NormCall(reader, norm)


def norm_behind(node: fx.Node) -> NormCall | None:
    """The BatchNorm that can be folded into the layer `node`: the only user of its output, along its channels.

    Returns None if there is none, or if the layer or the BatchNorm has hooks or a forward method of its own.
    """
    layer, norm = layer_of(node), norm_reading(node)
    if norm is None or not isinstance(layer, Layer) or not is_plain(layer) or is_hooked(norm.module):
        return None
    flat = not isinstance(layer, nn.Linear) or rank_of(node) == 2
    return norm if flat and norm.module.num_features == len(layer.weight) else None


def norms_behind(model: nn.Module, images: NetworkInput) -> dict[str, Norm]:
    """Layer -> the BatchNorm after it, for the layers of `model` that have one; captures the network on `images`.

    Raises:
        InputError: the network cannot be captured.
    """
    calls = ((str(node.target), norm_behind(node)) for node in capture(model, images).graph.nodes)
    return {name: norm.module for name, norm in calls if norm is not None}
