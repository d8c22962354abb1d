"""Optimal Brain Surgeon for channels (`importance: obs`): loss increase after the following layers are refitted.

Hassibi and Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", NIPS 1992, for whole channels
and factored by layer as in Wang et al., "EigenDamage: Structured Pruning in the Kronecker-Factored Eigenbasis", ICML
2019 (their Kron-OBS):

    I_c = 1/2 sum over the layers that read c of tr(inv(H_cc) W_c^T G W_c)    W: (C_out, C_in * kernel), W_c: of c
    W  <-  W - W_c X,   H  <-  H - H_c^T X,   X = inv(H_cc) H_c               H = inv(S + r I)
    S = covariance of the inputs at a position                                (C_in * kernel, C_in * kernel)
    G = E over images of sum over positions of g g^T                          (C_out, C_out)
    g = gradient of sum_k s_k (z_k - mean z) at the position's output, z: logits (N, classes, ...), s: random signs

G is the Fisher matrix of the loss on the labels in the paper. Here it is the Gauss-Newton matrix of squared logits: the
Fisher matrix is almost zero for a network that is confident on its training images. Channels are removed greedily, the
one with the smallest loss increase first; an importance is at least that of the channel before, so that the scores keep
this order. In wide groups, up to 1/64 of the channels are removed in one step: those whose loss increase, given the
removals before, is still below that of every other channel. S is approximated by its diagonal if a layer has more than
4,608 input features, or if the positions of `images` images (of 1,024, if these are too few) are fewer than twice the
features. Grouped convolutions, and layers that do not influence the outputs, are skipped.

Where the task has no logits, z are all floating-point outputs, each divided by its norm over the batch and not
centered: the loss is the relative squared error from the original's outputs. Logits of independent classes (multilabel)
are not centered either.

On a ResNet-56 on CIFAR-10 JPEG, for 99 prunings of one layer by an eighth to seven eighths, log I and the log of the
measured KL divergence from the original (1,024 training images) have a correlation of 0.96, and a slope of 1.07
(`bench/pruning_losses.py`). With half of the MACs removed from the inner layers, before any training, the divergence is
0.36 for channels chosen by magnitude and 0.32 for channels chosen by I, both with the same fraction in every layer. It
is 0.22 if the fractions are chosen by I per MAC, too (scope `global`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersor.core.errors import InputError
from tersor.core.progress import NO_PROGRESS, ProgressReporter
from tersor.data.network_inputs import tensors_of
from tersor.graph.eval_mode import evaluating, first_images
from tersor.graph.forward_call import run
from tersor.pruning.activation_moments import (
    InputMoments,
    add_ridge,
    reads_all_channels,
    removed_afterwards,
    sampled_inputs,
)
from tersor.pruning.channel_groups import Group
from tersor.pruning.output_changes import compared_values
from tersor.tasks.classification import CLASSIFICATION
from tersor.tasks.task import Task

_MIN_STEPS = 64
"""The removal of a whole group takes at least so many steps."""

_MAX_IMAGES = 1024
"""Images used where the positions of fewer are too few for a covariance."""


@dataclass
class _Statistics:
    """Of a layer: moments of its inputs, and sums of g g^T over images and positions, (C_out, C_out)."""

    inputs: InputMoments = field(default_factory=InputMoments)
    gradients: Tensor | None = None

    def add_gradient(self, gradient: Tensor, *, convolution: bool) -> None:
        """Add (N, C, H, W), or (N, ..., C)."""
        rows = (gradient.movedim(1, -1) if convolution else gradient).flatten(0, -2).float()
        products = rows.T @ rows
        self.gradients = products if self.gradients is None else self.gradients + products


def loss_increases(
    graph: fx.GraphModule,
    groups: Sequence[Group],
    data: Iterable[Any],
    images: int,
    progress: ProgressReporter = NO_PROGRESS,
    task: Task = CLASSIFICATION,
) -> list[Tensor | None]:
    """The loss increase without each channel, (channels,) for every group; None where no layer has statistics.

    Args:
        graph: a captured network without masks and quantizers; unchanged afterwards.
        groups: groups of its channels.
        data: batches of images (N, C, H, W).
        images: how many of them are used, at least.
        progress: reports both passes.
        task: gives the logits.

    Raises:
        InputError: there is no image, the network returns no floating-point tensor, or a value is not finite.
    """
    columns = [_columns(graph, group) for group in groups]
    layers_read = {name for each in columns for name in each}
    statistics, count = _collect(graph, layers_read, data, images, progress, task)
    increases: list[Tensor | None] = []
    progress.start("loss increase of each channel group", len(groups))
    for group, of_layers in zip(groups, columns, strict=True):
        layers = [
            _LayerHessian(graph.get_submodule(name), statistics[name], count, each)
            for name, each in of_layers.items()
            if statistics[name].gradients is not None  # it was called, and influences the outputs
        ]
        increases.append(_remove_all(layers, len(group.slices)) if layers else None)
        progress.advance()
    if not all(each is None or each.isfinite().all() for each in increases):
        raise InputError(
            "importance: obs computed losses that are not finite. Use images and a network without NaN and "
            "infinity, or write importance: magnitude."
        )
    return increases


def _columns(graph: fx.GraphModule, group: Group) -> dict[str, Tensor]:
    """Layer that reads the group -> columns of its weight for every channel, (channels, columns)."""
    channels: dict[str, list[tuple[int, ...]]] = {}
    for slices in group.slices:
        for cut in slices:
            if cut.axis == "in" and reads_all_channels(graph, cut.layer):
                channels.setdefault(cut.layer, []).append(cut.channels)
    columns: dict[str, Tensor] = {}
    for name, each in channels.items():
        weight = graph.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        kernel = weight[0, 0].numel()
        columns[name] = (torch.tensor(each)[..., None] * kernel + torch.arange(kernel)).flatten(1)
    return columns


def _collect(
    graph: fx.GraphModule, layers: set[str], data: Iterable[Any], images: int, progress: ProgressReporter, task: Task
) -> tuple[dict[str, _Statistics], int]:
    """Statistics by layer, and the number of images."""
    statistics, count, most = {name: _Statistics() for name in layers}, 0, max(images, _MAX_IMAGES)
    positions, signs = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    reached = _reached_by_images(graph)
    starts: list[Tensor] = []  # the images, and outputs of layers behind values that the network detaches

    def observe(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        statistics[name].inputs.add(sampled_inputs(layer, inputs[0].detach(), positions).float())
        if not output.requires_grad and name in reached:
            starts.append(output.requires_grad_())
        if output.requires_grad:
            output.register_hook(partial(statistics[name].add_gradient, convolution=isinstance(layer, nn.Conv2d)))

    hooks = [graph.get_submodule(name).register_forward_hook(partial(observe, name)) for name in sorted(layers)]
    progress.start("Hessian statistics", most)
    with removed_afterwards(hooks), evaluating(graph), _frozen(graph), torch.inference_mode(mode=False):
        for batch in first_images(data, most, next(graph.parameters()).device):
            inputs = batch.clone().requires_grad_()
            starts[:] = [each for each in tensors_of(inputs) if each.requires_grad]
            with torch.enable_grad():
                values = compared_values(run(graph, inputs.clone()), task)
            if not values.requires_grad:
                raise InputError(
                    "importance: obs needs gradients of the outputs, but they do not depend on the images, or the "
                    "forward method detaches them. Write importance: magnitude."
                )
            sign = torch.randint(0, 2, values.shape, generator=signs).to(values) * 2 - 1
            torch.autograd.grad((values * sign).sum(), starts, allow_unused=True)
            count += len(batch)
            progress.advance(len(batch))
            if count >= images and all(each.inputs.sufficient for each in statistics.values()):
                break
    if not count:
        raise InputError("importance: obs needs images; none were given. Pass AttachContext(data=...).")
    return statistics, count


def _reached_by_images(graph: fx.GraphModule) -> set[str]:
    """The modules whose input is computed from the images, by name."""
    reached: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return {str(node.target) for node in reached if node.op == "call_module"}


@contextmanager
def _frozen(graph: nn.Module) -> Generator[None]:
    """Context in which no parameter has a gradient."""
    learned = [each for each in graph.parameters() if each.requires_grad]
    try:
        for each in learned:
            each.requires_grad = False
        yield
    finally:
        for each in learned:
            each.requires_grad = True


class _LayerHessian:
    """H and P = W^T G W of a layer that reads a group, updated at each removal; with a diagonal S, the increases."""

    def __init__(self, layer: nn.Module, statistics: _Statistics, images: int, columns: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        assert statistics.gradients is not None
        self.columns = columns
        weight = layer.weight.detach().cpu().flatten(1).double()
        weighted = statistics.gradients.cpu().double() / images @ weight
        covariance = statistics.inputs.covariance(weight.shape[1])
        self.diagonal = covariance is None
        if covariance is None:
            self.increases = ((weight * weighted).sum(0) * statistics.inputs.variance)[columns].sum(1) / 2
        else:
            self.inverse, self.products = torch.linalg.inv(add_ridge(covariance)), weight.T @ weighted

    def restricted_to(self, channels: Tensor) -> _LayerHessian:
        """The same for a few channels, while all others stay."""
        part = copy.copy(self)
        part.columns = torch.arange(self.columns[channels].numel()).reshape(len(channels), -1)
        if self.diagonal:
            part.increases = self.increases[channels]
        else:
            columns = self.columns[channels].flatten()
            part.inverse, part.products = self.inverse[columns][:, columns], self.products[columns][:, columns]
        return part

    def loss_increase(self, channels: Tensor) -> Tensor:
        """Of each of these channels, (channels,)."""
        if self.diagonal:
            return self.increases[channels]
        columns = self.columns[channels]
        inner = columns[:, :, None], columns[:, None, :]
        return (torch.linalg.inv(self.inverse[inner]) * self.products[inner]).sum((1, 2)) / 2

    def remove(self, channels: Tensor) -> None:
        """Refit the remaining weights: W <- W - W_c X, X = inv(H_cc) H_c."""
        if self.diagonal:
            return
        columns = self.columns[channels].flatten()
        fit = torch.linalg.solve(self.inverse[columns][:, columns], self.inverse[columns])
        self.inverse -= self.inverse[:, columns] @ fit
        half = self.products[columns] - self.products[columns][:, columns] @ fit / 2
        self.products -= fit.T @ half + half.T @ fit


def _remove_all(layers: Sequence[_LayerHessian], channels: int) -> Tensor:
    """Remove all channels greedily; return the increase at each one's removal, (channels,), strictly rising."""
    increases, remaining = torch.zeros(channels), torch.arange(channels)
    while len(remaining):
        removed = _next_channels(layers, remaining, max(1, channels // _MIN_STEPS))
        for channel, increase in removed.items():
            increases[channel] = max(increase, float(torch.nextafter(increases.max(), torch.tensor(torch.inf))))
        for layer in layers:
            layer.remove(torch.tensor([*removed]))
        remaining = remaining[torch.isin(remaining, torch.tensor([*removed]), invert=True)]
    return increases


def _next_channels(layers: Sequence[_LayerHessian], remaining: Tensor, most: int) -> dict[int, float]:
    """Up to `most` channels to remove next, each with its increase after those before; below that of all others."""
    increases = _total_increase(layers, remaining)
    order = increases.argsort(stable=True)
    chosen, bar = remaining[order[:most]], float(increases[order[most]]) if len(order) > most else math.inf
    parts, left = [layer.restricted_to(chosen) for layer in layers], torch.arange(len(chosen))
    removed: dict[int, float] = {}
    while len(left):
        each = _total_increase(parts, left)
        lowest = int(each.argmin())
        if removed and not float(each[lowest]) <= bar:
            break
        removed[int(chosen[left[lowest]])] = float(each[lowest])
        for part in parts:
            part.remove(left[lowest : lowest + 1])
        left = left[torch.arange(len(left)) != lowest]
    return removed


def _total_increase(layers: Sequence[_LayerHessian], channels: Tensor) -> Tensor:
    return torch.stack([layer.loss_increase(channels) for layer in layers]).sum(0)
