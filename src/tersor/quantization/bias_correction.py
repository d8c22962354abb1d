"""Bias correction: what rounding adds to the mean of a layer's channels is taken away again.

Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", ICCV 2019, the empirical way:

    bias_c <- bias_c - (E[y'_c] - E[y_c])       y, y' (N, C, ...): of the network in float, and as it is rounded

The means are over images and positions. The layers are taken one after the other, in one pass over one large batch:
each is corrected before what it gives goes on. A BatchNorm behind a layer takes the difference into its running mean.
A layer with neither is left as it is; the paper has a bias everywhere.

Clipped weights also shrink what their layer gives, and the more so the further down. So, beyond the paper, a BatchNorm
can take over the standard deviations too: its running variance is set so that what it gives is spread as in float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersor.core.errors import InputError
from tersor.graph.batchnorm import Norm
from tersor.graph.batchnorm_behind import norm_reading
from tersor.graph.batchnorm_statistics import Moments, fit, in_unit_of
from tersor.graph.capture import layer_of, parameter_reads
from tersor.graph.layer_selection import Layer
from tersor.quantization.qdq_placement import quantizable

_POSITIONS = 2**20
"""Pixels in the one batch: about 1,000 images of 32 x 32, or 20 of 224 x 224."""


def batch_of(images: Iterable[Tensor]) -> Tensor:
    """One batch of the `images` (N, C, H, W), no larger than the means need.

    Raises:
        InputError: there are none, since the data was read before.
    """
    taken: list[Tensor] = []
    for some in images:
        room = _POSITIONS // some[0, 0].numel() - sum(map(len, taken))
        taken.append(some[: max(1, room)])
        if room <= len(some):
            break
    if not taken:
        raise InputError("bias correction reads the data again, and found no image. Pass a DataLoader or a list.")
    return torch.cat(taken)


@torch.no_grad()
def moments(graph: fx.GraphModule, images: Tensor) -> dict[str, Moments]:
    """Layer -> the moments of what it gives for `images` (N, C, H, W)."""
    norms, found = _correctable(graph), dict[str, Moments]()

    def look(layer: nn.Module, _inputs: object, output: Tensor, *, name: str) -> None:
        norm, given = norms[name], _moments(output, layer, norms[name])
        found[name] = given if norm is None else in_unit_of(given, norm)

    _run(graph, images, list(norms), look)
    return found


@torch.no_grad()
def correct(graph: fx.GraphModule, images: Tensor, before: dict[str, Moments], *, spreads: bool = False) -> None:
    """Takes the shift of every layer's means from its bias, or into the running mean of the BatchNorm behind it.

    Once more does no harm: where other layers round now, it is as if the first time had not been.

    Args:
        graph: the network as it is rounded; in eval.
        images: (N, C, H, W), those of `before`.
        before: what `moments` gave when nothing was rounded.
        spreads: whether a BatchNorm takes over what rounding does to the standard deviations too.
    """
    norms = _correctable(graph)

    def shift(layer: nn.Module, _inputs: object, output: Tensor, *, name: str) -> Tensor | None:
        norm, wanted = norms[name], before[name]
        found = _moments(output, layer, norm)
        if norm is not None:
            fit(norm, found, wanted, spreads=spreads)
            return None
        assert isinstance(layer, Layer)
        assert layer.bias is not None
        added = found.mean - wanted.mean
        layer.bias.sub_(added)
        return output - (added.reshape(-1, 1, 1) if isinstance(layer, nn.Conv2d) else added)

    _run(graph, images, list(norms), shift)


def _run(graph: fx.GraphModule, images: Tensor, names: list[str], hook: Callable[..., Any]) -> None:
    hooks = [graph.get_submodule(name).register_forward_hook(partial(hook, name=name)) for name in names]
    try:
        graph(images)
    finally:
        for each in hooks:
            each.remove()


def _correctable(graph: fx.GraphModule) -> dict[str, Norm | None]:
    """Layers that are called once and have a BatchNorm behind them, or a bias of their own that is added last."""
    known, calls = quantizable(graph), [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    reads = parameter_reads(graph)
    found: dict[str, Norm | None] = {}
    for node in graph.graph.nodes:
        layer = layer_of(node)
        if not isinstance(layer, Layer) or calls.count(str(node.target)) > 1:
            continue
        norm = norm_reading(node)
        if norm is not None and calls.count(str(norm.node.target)) == 1:
            found[str(node.target)] = norm.module
        elif layer.bias is not None and node.target in known and reads[id(layer.bias)] == 1:
            found[str(node.target)] = None
    return found


def _moments(output: Tensor, layer: nn.Module, norm: Norm | None) -> Moments:
    """Of each channel, (C,): a BatchNorm's lie along dimension 1, a Linear's along the last."""
    channels = 1 if norm is not None or isinstance(layer, nn.Conv2d) else -1
    values = output.float().movedim(channels, -1).flatten(0, -2)
    return Moments(values.mean(0), values.std(0, correction=0))
