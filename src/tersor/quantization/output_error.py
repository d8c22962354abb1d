"""Weight ranges that minimize the error of a layer's outputs instead of that of its weights.

With uncorrelated inputs x_i, rounding w to w_hat changes a channel's output by

    E[(sum_i (w_hat_i - w_i) x_i)^2] = sum_i (w_hat_i - w_i)^2 E[x_i^2]

In a re-parametrized network (RepVGG), a channel may have one weight hundreds of times larger than all others, on an
input that is always zero: the BatchNorm of its identity branch divides by the standard deviation of that input. A range
that spans this weight rounds the others to zero. The diagonal of GPTQ's Hessian (Frantar et al., ICLR 2023) is the same
E[x_i^2].
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.target import Target
from tersor.data.network_inputs import NetworkInput
from tersor.graph.forward_call import run
from tersor.graph.layer_selection import Convolution, Layer
from tersor.graph.parametrization import parametrization_input
from tersor.quantization.observers import weight_grid
from tersor.quantization.quantizers import Quantizers

_LEAST = 1e-6
"""Smallest mean square of an input relative to the mean of all: it may occur on other images."""


@torch.no_grad()
def set_weight_grids(quantizers: Quantizers, energies: dict[str, Tensor], target: Target) -> None:
    """Set the grids of all weights.

    Args:
        quantizers: quantizers of the network.
        energies: `input_energies` of the network in float.
        target: runtime and processor that the network is compressed for.
    """
    for name in quantizers.layers:
        quantizer, layer = quantizers.of_weight(name), quantizers.graph.get_submodule(name)
        weight = parametrization_input(layer, quantizer)
        channels = bool(quantizer.scale.ndim)
        each = _of_weights(energies[name], layer, weight)
        scale, zero_point = weight_grid(weight, quantizer.grid, per_channel=channels, weight_range="mse", energies=each)
        quantizer.set_grid(scale, zero_point)
        quantizers.limit_for_avx2_saturation(name, target)


@torch.no_grad()
def input_energies(quantizers: Quantizers, images: NetworkInput) -> dict[str, Tensor]:
    """Layer -> the mean square of each of its input channels, (C_in,), for `images` (N, C, H, W)."""
    found: defaultdict[str, list[Tensor]] = defaultdict(list)

    def record(layer: nn.Module, inputs: tuple[Any, ...], *, name: str) -> None:
        assert isinstance(layer, Layer)
        channels = 1 - layer.weight.ndim if isinstance(layer, Convolution) else -1
        values = inputs[0].float().movedim(channels, -1)
        found[name].append(values.reshape(-1, values.shape[-1]).square().mean(0))

    graph = quantizers.graph
    hooks = [
        graph.get_submodule(name).register_forward_pre_hook(partial(record, name=name)) for name in quantizers.layers
    ]
    try:
        run(graph, images)
    finally:
        for each in hooks:
            each.remove()
    return {name: torch.stack(calls).mean(0) for name, calls in found.items()}


def _of_weights(energies: Tensor, layer: nn.Module, weight: Tensor) -> Tensor:
    """The energies (C_in,) in the shape of the weight (C_out, C_in / groups, ...)."""
    assert isinstance(layer, Layer)
    groups = layer.groups if isinstance(layer, Convolution) else 1
    least = energies.clamp(min=_LEAST * float(energies.mean()))
    of_rows = least.reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)
    return of_rows.reshape(*of_rows.shape, *[1] * (weight.ndim - 2)).expand_as(weight)
