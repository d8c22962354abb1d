"""Bias correction: removes the shift that rounding adds to the means of a layer's channels.

Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", ICCV 2019, the empirical way:

    bias_c <- bias_c - (E[y'_c] - E[y_c])       y, y' (N, C, ...): outputs in float, and quantized

The means are over images and positions. The layers are corrected in order, in one pass over one large batch, so the
input of each includes the corrections of those before it. A BatchNorm after a layer takes the difference into its
running mean. A layer with neither BatchNorm nor bias stays unchanged; in the paper every layer has a bias.

Clipped weights also shrink the outputs of their layer, and this accumulates with depth. Beyond the paper, the running
variance of a BatchNorm can be set so that its outputs have the same standard deviations as in float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersor.core.errors import InputError
from tersor.data.network_inputs import NetworkInput, joined_inputs, same_sizes, tensors_of
from tersor.graph.batchnorm import Norm
from tersor.graph.batchnorm_behind import norm_reading
from tersor.graph.batchnorm_statistics import Moments, fit, in_unit_of
from tersor.graph.capture import layer_of, parameter_reads
from tersor.graph.forward_call import run
from tersor.graph.layer_selection import Convolution, Layer
from tersor.quantization.qdq_placement import quantizable

_POSITIONS = 2**20
"""Pixels in the batch: about 1,000 images of 32 x 32, or 20 of 224 x 224."""
_LEAST_IMAGES = 16


def batch_of(images: Iterable[NetworkInput]) -> NetworkInput:
    """One batch of the `images` (N, C, H, W), limited to what the means need.

    Images whose size differs from that of the first are left out. At least 16 images are taken, or the first batch if
    it is smaller: calibration runs that whole batch too, and needs almost as much memory.

    Raises:
        InputError: there are none.
    """
    taken: list[NetworkInput] = []
    for some in images:
        if taken and not same_sizes(taken[0], some):
            continue
        least = min(_LEAST_IMAGES, len(taken[0] if taken else some))
        most = max(least, _POSITIONS // max(prod(each.shape[2:]) for each in tensors_of(some)))
        room = most - sum(map(len, taken))
        taken.append(some[: max(1, room)])
        if room <= len(some):
            break
    if not taken:
        raise InputError("bias correction found no image in the data. Pass batches (N, C, H, W).")
    return joined_inputs(taken)


@torch.no_grad()
def moments(graph: fx.GraphModule, images: NetworkInput) -> dict[str, Moments]:
    """Layer -> the moments of its output for `images` (N, C, H, W)."""
    norms, found = _correctable(graph), dict[str, Moments]()

    def record(layer: nn.Module, _inputs: object, output: Tensor, *, name: str) -> None:
        norm, current = norms[name], _moments(output, layer, norms[name])
        found[name] = current if norm is None else in_unit_of(current, norm)

    _run(graph, images, list(norms), record)
    return found


@torch.no_grad()
def correct(
    graph: fx.GraphModule, images: NetworkInput, before: dict[str, Moments], *, variances: bool = False
) -> None:
    """Correct the means of every layer in its bias, or in the running mean of the BatchNorm after it.

    It can be repeated when other quantizers are enabled: the result does not depend on earlier corrections.

    Args:
        graph: the network with enabled quantizers, in eval mode.
        images: the images of `before`, (N, C, H, W).
        before: `moments` of the network in float.
        variances: also correct the standard deviations, in BatchNorms.
    """
    norms = _correctable(graph)

    def shift(layer: nn.Module, _inputs: object, output: Tensor, *, name: str) -> Tensor | None:
        norm, expected = norms[name], before[name]
        found = _moments(output, layer, norm)
        if norm is not None:
            fit(norm, found, expected, variances=variances)
            return None
        assert isinstance(layer, Layer)
        assert layer.bias is not None
        added = found.mean - expected.mean
        layer.bias.sub_(added)
        return output - (added.reshape(-1, *[1] * (layer.weight.ndim - 2)))

    _run(graph, images, list(norms), shift)


def _run(graph: fx.GraphModule, images: NetworkInput, names: list[str], hook: Callable[..., Any]) -> None:
    hooks = [graph.get_submodule(name).register_forward_hook(partial(hook, name=name)) for name in names]
    try:
        run(graph, images)
    finally:
        for each in hooks:
            each.remove()


def _correctable(graph: fx.GraphModule) -> dict[str, Norm | None]:
    """The layers that are called once and have a BatchNorm after them, or else a bias."""
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
    """Moments of each channel, (C,): dimension 1 for a BatchNorm or convolution, the last for a Linear."""
    channels = 1 if norm is not None or isinstance(layer, Convolution) else -1
    values = output.float().movedim(channels, -1).flatten(0, -2)
    return Moments(values.mean(0), values.std(0, correction=0))
