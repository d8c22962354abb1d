"""What removed channels gave to the layers behind is given by those that stay, as far as they can tell it.

He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, choose channels by lasso and
then fit the filters behind; of that the second step is here, in closed form and for every layer that reads.

    min over V, b of E ||V k + b - W x||_2^2 + r ||V - W_k||^2   x: (C_in * kernel,), what a position of the layer reads
                                                                 k: the part of x that stays, g: the part that goes
    V = W_k + W_g S_gk (S_kk + r I)^-1,   b = W E[x] - V E[k]    S: covariance of x

over images and up to 16 positions of each, drawn by a fixed seed; r is a thousandth of the mean variance of k. A
channel whose filter or BatchNorm factor is zero sends a constant on, which is all in b. A layer without a bias hands b
to the BatchNorm behind it (running mean -= b); one with neither is left without. Where the positions are too few to
tell (fewer than twice the numbers that stay), or a layer reads more than 4,608 numbers, V = W_k, and b makes up for the
mean alone. Convolutions by groups stay as they are.

DCIL's released checkpoints show the need of b: of 492 dead filters 346 send on a constant that is not zero. A ResNet-56
on CIFAR-10 JPEG, half of its MACs gone by magnitude, on the test images without any training: 75.8 % with new
statistics of BatchNorm, 81.3 % with this before, 83.4 % where statistics are moved, not taken anew (`statistics.py`).
Trained on, it was not seen to gain by it.
"""

from __future__ import annotations

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
from tersor.pruning.activation_moments import ReadMoments, read, reads_whole, with_ridge
from tersor.pruning.channel_groups import Cut


@dataclass(frozen=True)
class Fit:
    """What a layer gets for what it loses.

    Attributes:
        weight: (C_out, C_in, ...), of what stays.
        bias: (C_out,), to be added.
    """

    weight: Tensor
    bias: Tensor


def fitted(
    graph: fx.GraphModule,
    cuts: Sequence[Cut],
    data: Iterable[Any],
    images: int,
    progress: ProgressReporter = NO_PROGRESS,
) -> dict[str, Fit]:
    """Layer -> what it gets, where its columns in `cuts` go.

    Args:
        graph: the network before the cuts.
        cuts: what goes.
        data: batches of images (N, C, H, W).
        images: how many of them are looked at.

    Raises:
        InputError: there is no image.
    """
    gone = {(cut.layer, cut.axis): list(cut.channels) for cut in cuts}
    moments = {layer: ReadMoments() for layer, axis in gone if axis == "in" and reads_whole(graph, layer)}
    drawn = torch.Generator().manual_seed(0)

    def look(name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        moments[name].add(read(layer, given[0], drawn).float())

    hooks = [graph.get_submodule(name).register_forward_pre_hook(partial(look, name)) for name in moments]
    try:
        with evaluating(graph), torch.no_grad():
            _run(graph, data, images, progress)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: _fit(graph.get_submodule(name), found, gone[name, "in"], gone.get((name, "out"), []))
        for name, found in moments.items()
        if found.count
    }


def _run(graph: fx.GraphModule, data: Iterable[Any], images: int, progress: ProgressReporter) -> None:
    done = 0
    progress.start("least squares: layer inputs", images)
    for some in first_images(data, images, next(graph.parameters()).device):
        graph(some)
        done += len(some)
        progress.advance(len(some))
    if not done:
        raise InputError("what channels send on is seen on images; none were given. Pass data=...")


@torch.no_grad()
def _fit(layer: nn.Module, seen: ReadMoments, gone_in: list[int], gone_out: list[int]) -> Fit:
    assert isinstance(layer.weight, Tensor)
    rows = torch.ones(len(layer.weight), dtype=torch.bool)
    rows[gone_out] = False
    stays = torch.ones(layer.weight.shape[1], dtype=torch.bool)
    stays[gone_in] = False
    kept = stays.repeat_interleave(layer.weight[0, 0].numel())
    weight, mean = layer.weight.cpu()[rows].flatten(1).double(), seen.mean
    found, covariance = weight[:, kept], seen.covariance(int(kept.sum()))
    if covariance is not None:
        inner = with_ridge(covariance[kept][:, kept])
        found = found + weight[:, ~kept] @ torch.linalg.solve(inner, covariance[kept][:, ~kept]).T
    shape = int(rows.sum()), int(stays.sum()), *layer.weight.shape[2:]
    return Fit(found.reshape(shape).to(layer.weight), (weight @ mean - found @ mean[kept]).to(layer.weight))


@torch.no_grad()
def take_over(graph: fx.GraphModule, fits: Mapping[str, Fit]) -> None:
    """Gives layers what was fitted for them; a bias to the BatchNorm behind where a layer has none."""
    nodes = {node.target: node for node in reversed(graph.graph.nodes) if node.op == "call_module"}
    for name, fit in fits.items():
        layer, norm = graph.get_submodule(name), norm_behind(nodes[name]) if name in nodes else None
        assert isinstance(layer.weight, Tensor)
        layer.weight.copy_(fit.weight)
        if isinstance(layer.bias, Tensor):
            layer.bias += fit.bias
        elif norm is not None and norm.module.running_mean is not None:
            norm.module.running_mean -= fit.bias
