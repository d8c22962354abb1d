"""What the answers lose when channels go, and the layers that read them are fitted to what stays: `importance: obs`.

Hassibi and Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", NIPS 1992, in whole channels
and factored by layer as in Wang et al., "EigenDamage: Structured Pruning in the Kronecker-Factored Eigenbasis", ICML
2019 (their Kron-OBS):

    I_c = 1/2 sum over the layers that read c of tr(inv(H_cc) W_c^T G W_c)    W: (C_out, C_in * kernel), W_c: of c
    W  <-  W - W_c X,   H  <-  H - H_c^T X,   X = inv(H_cc) H_c               H = inv(S + r I)
    S = covariance of what a position reads                                   (C_in * kernel, C_in * kernel)
    G = E over images of sum over positions of g g^T                          (C_out, C_out)
    g = gradient of sum_k s_k (z_k - mean z) at the position's output, z: logits, s: random signs

The paper has the Fisher matrix of the labels' loss in place of G. Here G is the Gauss-Newton matrix of squared logits:
a network that is sure of its training images has hardly a gradient there. One channel after the other goes, the one of
which least is lost; the next are told what is lost without it (the largest so far, so that the scores are in that
order). Of a wide group up to a 64th goes at once: those that lose less than any other behind each other, too. Where
the positions of `images`, or else of 1,024 images, are too few to tell what a layer reads apart (fewer than twice the
numbers, or more than 4,608 of these), S is taken to be diagonal. A layer that reads groups of channels, or that the
answers do not hang on, is passed over.

Of a ResNet-56 on CIFAR-10 JPEG 99 prunings of one layer by an eighth to seven eighths were measured by hand, by KL
divergence from the original on 1,024 training images: the logarithms of I and of what was measured correlate by 0.96,
with a slope of 1.07. `bench/pruning_losses.py` has rows of the like. Half of the MACs gone from all inner layers,
before any training, the divergence is 0.36 by magnitude, the same fraction everywhere; 0.32 with these channels; 0.22
where the widths are chosen by I for each MAC that goes, too (scope `global`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersor.core.errors import InputError
from tersor.core.progress import NO_PROGRESS, ProgressReporter
from tersor.graph.eval_mode import evaluating, first_images
from tersor.pruning.activation_moments import ReadMoments, centred, read, reads_whole, with_ridge
from tersor.pruning.channel_groups import Group

_STEPS = 64
"""At least as many the removal of a whole group takes."""

_MOST_IMAGES = 1024
"""That are looked at where a layer's positions are too few on those that were asked for."""


@dataclass
class _Seen:
    """Of a layer: what its positions read, and sums of g g^T over images and positions, (C_out, C_out)."""

    read: ReadMoments = field(default_factory=ReadMoments)
    gradients: Tensor | None = None

    def add(self, gradient: Tensor, *, convolved: bool) -> None:
        """Takes in (N, C, H, W), or (N, ..., C)."""
        each = (gradient.movedim(1, -1) if convolved else gradient).flatten(0, -2).float()
        products = each.T @ each
        self.gradients = products if self.gradients is None else self.gradients + products


def losses(
    graph: fx.GraphModule,
    groups: Sequence[Group],
    data: Iterable[Any],
    images: int,
    progress: ProgressReporter = NO_PROGRESS,
) -> list[Tensor | None]:
    """Of every group what the answers lose by each of its channels, (channels,); None where no layer tells.

    Args:
        graph: a captured network without masks and grids; it comes back as it was.
        groups: of its channels.
        data: batches of images (N, C, H, W).
        images: how many of them are looked at, at least.
        progress: reports both passes.

    Raises:
        InputError: there is no image, the network gives no logits, or something is not finite.
    """
    columns = [_columns(graph, group) for group in groups]
    seen, count = _look(graph, {name for each in columns for name in each}, data, images, progress)
    found: list[Tensor | None] = []
    progress.start("loss increase of each channel group", len(groups))
    for group, places in zip(groups, columns, strict=True):
        readers = [
            _Reader(graph.get_submodule(name), seen[name], count, each)
            for name, each in places.items()
            if seen[name].gradients is not None  # it was called, and the answers hang on it
        ]
        found.append(_lost(readers, len(group.slices)) if readers else None)
        progress.advance()
    if not all(each is None or each.isfinite().all() for each in found):
        raise InputError(
            "importance: obs found losses that are not finite. Give images, and a network, without NaN and infinity, "
            "or write importance: magnitude."
        )
    return found


def _columns(graph: fx.GraphModule, group: Group) -> dict[str, Tensor]:
    """Layer that reads the group -> columns of its weight for every channel, (channels, columns)."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for unit in group.slices:
        for cut in unit:
            if cut.axis == "in" and reads_whole(graph, cut.layer):
                found.setdefault(cut.layer, []).append(cut.channels)
    made: dict[str, Tensor] = {}
    for name, places in found.items():
        weight = graph.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        kernel = weight[0, 0].numel()
        made[name] = (torch.tensor(places)[..., None] * kernel + torch.arange(kernel)).flatten(1)
    return made


def _look(
    graph: fx.GraphModule, layers: set[str], data: Iterable[Any], images: int, progress: ProgressReporter = NO_PROGRESS
) -> tuple[dict[str, _Seen], int]:
    """Layer -> what was seen of it, and on how many images."""
    seen, count, most = {name: _Seen() for name in layers}, 0, max(images, _MOST_IMAGES)
    drawn, signs = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)

    def watch(name: str, layer: nn.Module, given: tuple[Tensor, ...], gives: Tensor) -> None:
        seen[name].read.add(read(layer, given[0].detach(), drawn).float())
        gives.register_hook(partial(seen[name].add, convolved=isinstance(layer, nn.Conv2d)))

    hooks = [graph.get_submodule(name).register_forward_hook(partial(watch, name)) for name in sorted(layers)]
    progress.start("Hessian statistics", most)
    try:
        with evaluating(graph), torch.inference_mode(mode=False), torch.enable_grad():
            for some in first_images(data, most, next(graph.parameters()).device):
                given = some.clone().requires_grad_()
                own = given.clone()  # where the network changes what it is given
                answers = centred(_logits(graph(own)))
                sign = torch.randint(0, 2, answers.shape, generator=signs).to(answers) * 2 - 1
                torch.autograd.grad((answers * sign).sum(), given, allow_unused=True)
                count += len(some)
                progress.advance(len(some))
                if count >= images and all(each.read.enough for each in seen.values()):
                    break
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise InputError("importance: obs needs images; none were given. Pass data=...")
    return seen, count


def _logits(answers: Any) -> Tensor:
    """What the network gave, if it can be followed back to the images."""
    if not isinstance(answers, Tensor) or not answers.requires_grad:
        what = "answers that no image moves" if isinstance(answers, Tensor) else f"a {type(answers).__name__}"
        raise InputError(
            f"importance: obs follows logits (N, classes) back to the images, and the network gives {what}. Write "
            "importance: magnitude."
        )
    return answers


class _Reader:
    """A layer that reads a group, while channels of the group go: H and P = W^T G W, or what each loses alone."""

    def __init__(self, layer: nn.Module, seen: _Seen, images: int, columns: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        assert seen.gradients is not None
        self.columns = columns
        weight = layer.weight.detach().cpu().flatten(1).double()
        weighed = seen.gradients.cpu().double() / images @ weight
        covariance = seen.read.covariance(weight.shape[1])
        self.apart = covariance is None
        if covariance is None:
            self.alone = ((weight * weighed).sum(0) * seen.read.variance)[columns].sum(1) / 2
        else:
            self.inverse, self.products = torch.linalg.inv(with_ridge(covariance)), weight.T @ weighed

    def of(self, channels: Tensor) -> _Reader:
        """The same of these channels alone, while all others stay."""
        part = copy.copy(self)
        part.columns = torch.arange(self.columns[channels].numel()).reshape(len(channels), -1)
        if self.apart:
            part.alone = self.alone[channels]
        else:
            gone = self.columns[channels].flatten()
            part.inverse, part.products = self.inverse[gone][:, gone], self.products[gone][:, gone]
        return part

    def lost(self, channels: Tensor) -> Tensor:
        """By each of these channels, (channels,)."""
        if self.apart:
            return self.alone[channels]
        columns = self.columns[channels]
        inner = columns[:, :, None], columns[:, None, :]
        return (torch.linalg.inv(self.inverse[inner]) * self.products[inner]).sum((1, 2)) / 2

    def remove(self, channels: Tensor) -> None:
        """What stays is fitted: W <- W - W_c X, X = inv(H_cc) H_c."""
        if self.apart:
            return
        gone = self.columns[channels].flatten()
        fit = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone])
        self.inverse -= self.inverse[:, gone] @ fit
        half = self.products[gone] - self.products[gone][:, gone] @ fit / 2
        self.products -= fit.T @ half + half.T @ fit


def _lost(readers: Sequence[_Reader], channels: int) -> Tensor:
    """By every channel, behind all of which less is lost, (channels,)."""
    found, stays = torch.zeros(channels), torch.arange(channels)
    while len(stays):
        gone = _next(readers, stays, max(1, channels // _STEPS))
        for channel, lost in gone.items():
            found[channel] = max(lost, float(torch.nextafter(found.max(), torch.tensor(torch.inf))))
        for reader in readers:
            reader.remove(torch.tensor([*gone]))
        stays = stays[torch.isin(stays, torch.tensor([*gone]), invert=True)]
    return found


def _next(readers: Sequence[_Reader], stays: Tensor, most: int) -> dict[int, float]:
    """Up to `most` channels that go next, and what each loses behind those before: less than any other, as it was."""
    lost = _lost_by(readers, stays)
    order = lost.argsort(stable=True)
    chosen, bar = stays[order[:most]], float(lost[order[most]]) if len(order) > most else math.inf
    among, left, found = [reader.of(chosen) for reader in readers], torch.arange(len(chosen)), dict[int, float]()
    while len(left):
        each = _lost_by(among, left)
        lowest = int(each.argmin())
        if found and not float(each[lowest]) <= bar:
            break
        found[int(chosen[left[lowest]])] = float(each[lowest])
        for reader in among:
            reader.remove(left[lowest : lowest + 1])
        left = left[torch.arange(len(left)) != lowest]
    return found


def _lost_by(readers: Sequence[_Reader], channels: Tensor) -> Tensor:
    return torch.stack([reader.lost(channels) for reader in readers]).sum(0)
