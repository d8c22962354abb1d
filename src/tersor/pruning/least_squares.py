"""Least-squares reconstruction: layers that read removed channels are refitted to the remaining channels.

He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, select channels by lasso and
refit the next layer. This is their second step, in closed form and for every layer that reads the channels.

    min over V, b of E ||V k + b - W x||_2^2 + r ||V - W_k||^2   x: (C_in * kernel,), inputs at one position
                                                                 k: the remaining part of x, g: the removed part
    V = W_k + W_g S_gk (S_kk + r I)^-1,   b = W E[x] - V E[k]    S: covariance of x

over images and up to 16 positions of each, drawn with a fixed seed; r is a thousandth of the mean variance of k. A
channel whose filter or BatchNorm factor is zero outputs a constant, which b covers. A layer without a bias passes b to
the BatchNorm after it (running mean -= b); one with neither drops it. With fewer positions than twice the remaining
features, or more than 4,608 features, V = W_k and b restores the mean alone. Grouped convolutions are not refitted.

DCIL's released checkpoints show why b is needed: of 492 dead filters 346 output a constant that is not zero. A
ResNet-56 on CIFAR-10 JPEG, with half of its MACs removed by magnitude, reaches on the test images without any training:
75.8 % if BatchNorm statistics are estimated again, 81.3 % if the layers are refitted before that, and 83.4 % if the
layers are refitted and the statistics corrected (`graph/batchnorm_statistics.py`) instead of estimated again. No gain
was seen after further training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersor.core.errors import InputError
from tersor.core.progress import NO_PROGRESS, ProgressReporter
from tersor.graph.batchnorm_behind import norm_behind
from tersor.graph.eval_mode import evaluating, first_images
from tersor.graph.forward_call import run
from tersor.pruning.activation_moments import (
    InputMoments,
    add_ridge,
    reads_all_channels,
    removed_afterwards,
    sampled_inputs,
)
from tersor.pruning.channel_groups import Cut


@dataclass(frozen=True)
class Fit:
    """The new weight of a layer that loses input channels.

    Attributes:
        weight: (C_out, C_in, ...), of the remaining channels.
        bias: (C_out,), to be added.
    """

    weight: Tensor
    bias: Tensor


def fit_layers(
    graph: fx.GraphModule,
    cuts: Sequence[Cut],
    data: Iterable[Any],
    images: int,
    progress: ProgressReporter = NO_PROGRESS,
) -> dict[str, Fit]:
    """Fit every layer whose input channels are in `cuts`.

    Args:
        graph: the network before the cuts.
        cuts: the channels to be removed.
        data: batches of images (N, C, H, W).
        images: how many of them are used.

    Raises:
        InputError: there is no image.
    """
    removed = {(cut.layer, cut.axis): list(cut.channels) for cut in cuts}
    moments = {layer: InputMoments() for layer, axis in removed if axis == "in" and reads_all_channels(graph, layer)}
    generator = torch.Generator().manual_seed(0)

    def observe(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments[name].add(sampled_inputs(layer, inputs[0], generator).float())

    hooks = [graph.get_submodule(name).register_forward_pre_hook(partial(observe, name)) for name in moments]
    done = 0
    progress.start("least squares: layer inputs", images)
    with removed_afterwards(hooks), evaluating(graph), torch.no_grad():
        for batch in first_images(data, images, next(graph.parameters()).device):
            run(graph, batch)
            done += len(batch)
            progress.advance(len(batch))
    if not done:
        raise InputError("the least-squares fit needs images; none were given. Pass AttachContext(data=...).")
    return {
        name: _fit(graph.get_submodule(name), found, removed[name, "in"], removed.get((name, "out"), []))
        for name, found in moments.items()
        if found.count
    }


@torch.no_grad()
def _fit(layer: nn.Module, moments: InputMoments, removed_in: list[int], removed_out: list[int]) -> Fit:
    assert isinstance(layer.weight, Tensor)
    rows = torch.ones(len(layer.weight), dtype=torch.bool)
    rows[removed_out] = False
    channels = torch.ones(layer.weight.shape[1], dtype=torch.bool)
    channels[removed_in] = False
    kept = channels.repeat_interleave(layer.weight[0, 0].numel())
    weight, mean = layer.weight.cpu()[rows].flatten(1).double(), moments.mean
    fitted, covariance = weight[:, kept], moments.covariance(int(kept.sum()))
    if covariance is not None:
        inner = add_ridge(covariance[kept][:, kept])
        fitted = fitted + weight[:, ~kept] @ torch.linalg.solve(inner, covariance[kept][:, ~kept]).T
    shape = int(rows.sum()), int(channels.sum()), *layer.weight.shape[2:]
    return Fit(fitted.reshape(shape).to(layer.weight), (weight @ mean - fitted @ mean[kept]).to(layer.weight))


@torch.no_grad()
def apply_fits(graph: fx.GraphModule, fits: Mapping[str, Fit]) -> None:
    """Set the fitted weights and biases; the BatchNorm after a layer takes the bias of a layer without one.

    A bias that several layers share takes the mean of what each of them would take.
    """
    owners = Counter(id(parameter) for each in graph.modules() for parameter in each.parameters(recurse=False))
    nodes = {node.target: node for node in reversed(graph.graph.nodes) if node.op == "call_module"}
    for name, fit in fits.items():
        layer, norm = graph.get_submodule(name), norm_behind(nodes[name]) if name in nodes else None
        assert isinstance(layer.weight, Tensor)
        layer.weight.copy_(fit.weight)
        if isinstance(layer.bias, Tensor):
            layer.bias += fit.bias / owners[id(layer.bias)]
        elif norm is not None and norm.module.running_mean is not None:
            norm.module.running_mean -= fit.bias
