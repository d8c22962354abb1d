"""The BatchNorm behind a layer: the one that alone reads the layer's output.

A convolution has its channels along dimension 1, which BatchNorm normalizes. A fully connected layer has its features
along the last dimension, which is dimension 1 only for (N, F). For (N, T, F) a BatchNorm behind it normalizes T and
cannot be folded, and where T == F no shape of a tensor shows the difference. So `record_ranks` records the rank.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from tersor.graph.batchnorm import Norm
from tersor.graph.capture import capture, layer_of, sole_user
from tersor.graph.eval_mode import evaluating
from tersor.graph.layer_selection import Layer
from tersor.graph.plain_modules import has_plain_forward, is_hooked, is_plain

_RANK = "rank"  # key in a node's meta: number of dimensions of its output


class NormCall(NamedTuple):
    """A BatchNorm, and the node that calls it."""

    node: fx.Node
    module: Norm


def norm_reading(node: fx.Node) -> NormCall | None:
    """The BatchNorm that alone reads `node`, with running statistics and torch's own forward; it may have hooks."""
    reader = sole_user(node)
    norm = None if reader is None else layer_of(reader)
    if reader is None or not isinstance(norm, Norm) or norm.running_mean is None or not has_plain_forward(norm):
        return None
    return NormCall(reader, norm)


def norm_behind(node: fx.Node, *, assume_flat: bool = False) -> NormCall | None:
    """The BatchNorm that can be folded into the layer `node`: it alone reads the layer, and normalizes its channels.

    None also if one of the two has hooks or a forward of its own.

    Args:
        node: calls a layer.
        assume_flat: take the output of a fully connected layer for (N, F) if its rank is not recorded. For uses that
            change no value: scores, the places of quantizers.
    """
    layer, norm = layer_of(node), norm_reading(node)
    if norm is None or not isinstance(layer, Layer) or not is_plain(layer) or is_hooked(norm.module):
        return None
    rank = node.meta.get(_RANK, 2 if assume_flat or isinstance(layer, nn.Conv2d) else None)
    return norm if rank == 2 and norm.module.num_features == len(layer.weight) else None


@torch.no_grad()
def record_ranks(graph: fx.GraphModule, images: Tensor) -> None:
    """Records the ranks that `norm_behind` needs: runs `graph` on two `images` (N, C, H, W) if one is unknown."""
    unknown = [
        node
        for node in graph.graph.nodes
        if isinstance(layer_of(node), nn.Linear) and norm_behind(node, assume_flat=True) and _RANK not in node.meta
    ]
    if not unknown:
        return

    def record(_layer: nn.Module, _inputs: object, output: Tensor, *, node: fx.Node) -> None:
        node.meta[_RANK] = max(output.ndim, node.meta.get(_RANK, 0))  # a layer may be called twice

    hooks = [
        graph.get_submodule(str(each.target)).register_forward_hook(partial(record, node=each)) for each in unknown
    ]
    try:
        with evaluating(graph):
            graph(images[:2])
    finally:
        for hook in hooks:
            hook.remove()


def norms_behind(model: nn.Module) -> dict[str, Norm]:
    """Layer -> the BatchNorm behind it, for the layers of `model` that have one; captures the network.

    Raises:
        InputError: the network cannot be captured.
    """
    calls = ((str(node.target), norm_behind(node, assume_flat=True)) for node in capture(model).graph.nodes)
    return {name: norm.module for name, norm in calls if norm is not None}
