"""Which BatchNorm normalises the output channels of which layer.

A convolution has its channels along dimension 1, where BatchNorm normalises. A fully connected layer has its features
along the last dimension, which is dimension 1 for (N, F) alone. For (N, T, F) a BatchNorm behind it normalises T, and
must not be folded; where T == F no tensor's shape tells the two apart. So the rank is recorded on images.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, fx, nn

from tersor.graph.batchnorm import Norm
from tersor.graph.capture import capture, layer_of, sole_user
from tersor.graph.eval_mode import evaluating
from tersor.graph.layer_selection import Layer
from tersor.graph.plain_modules import is_plain

_RANK = "rank"  # under this key in a node's meta: dimensions of its output


def norm_behind(node: fx.Node) -> fx.Node | None:
    """The BatchNorm that alone reads the layer `node`, and normalises its channels by running statistics.

    None also where one of the two has a forward of its own, or nothing has recorded what rank a fully connected
    layer's output has.
    """
    known = isinstance(layer_of(node), nn.Conv2d) or _RANK in node.meta
    return likely_norm_behind(node) if known else None


def likely_norm_behind(node: fx.Node) -> fx.Node | None:
    """As `norm_behind`, but a fully connected layer of unknown rank is taken to give (N, F). For what changes no value:
    the places of quantizers, scores.
    """
    layer, behind = layer_of(node), sole_user(node)
    norm = None if behind is None else layer_of(behind)
    if not isinstance(layer, Layer) or not isinstance(norm, Norm) or not (is_plain(layer) and is_plain(norm)):
        return None
    fits = norm.running_mean is not None and norm.num_features == len(layer.weight)
    return behind if fits and node.meta.get(_RANK, 2) == 2 else None


def plain_norm(node: fx.Node | None) -> Norm | None:
    """The BatchNorm that `node` calls, with running statistics and torch's own forward."""
    norm = None if node is None else layer_of(node)
    return norm if isinstance(norm, Norm) and norm.running_mean is not None and is_plain(norm) else None


@torch.no_grad()
def record_ranks(graph: fx.GraphModule, images: Tensor) -> None:
    """Records what `norm_behind` needs to know: runs `graph` on a few `images` (N, C, H, W), unless all is known."""
    asked = [
        node
        for node in graph.graph.nodes
        if isinstance(layer_of(node), nn.Linear) and likely_norm_behind(node) is not None and _RANK not in node.meta
    ]
    if not asked:
        return

    def look(_layer: nn.Module, _inputs: object, output: Tensor, *, node: fx.Node) -> None:
        node.meta[_RANK] = max(output.ndim, node.meta.get(_RANK, 0))  # a layer may be called twice

    hooks = [graph.get_submodule(str(node.target)).register_forward_hook(partial(look, node=node)) for node in asked]
    try:
        with evaluating(graph):
            graph(images[:2])
    finally:
        for hook in hooks:
            hook.remove()


def norms_behind(model: nn.Module) -> dict[str, Norm]:
    """Layer -> the BatchNorm that alone reads what it gives, of those layers that have one; by the captured graph.

    Raises:
        InputError: the network cannot be captured.
    """
    found: dict[str, Norm] = {}
    for node in capture(model).graph.nodes:
        behind = likely_norm_behind(node)
        norm = None if behind is None else layer_of(behind)
        if isinstance(norm, Norm):
            found[str(node.target)] = norm
    return found
