"""Importance of coupled channels: of a group, a number for every channel; those of the lowest go first.

A channel owns rows of some layers, which produce it, and columns of others, which read it. What it owns of one layer W
(C_out, C_in, ...) is scored place by place, and summed where it has several places there (a column for every pixel,
behind a flatten).

    magnitude      mean over the layers of ||W[c]||_2^2 / mean_c ||W[c]||_2^2
    magnitude_l1   mean over the layers of ||W[c]||_1 / mean_c ||W[c]||_1            Li et al., ICLR 2017
    fpgm           mean over the layers of D_c / mean_c D_c, where D_c = sum_d ||W[c] - W[d]||_2: small near the
                   geometric median, whose work the others can do                    He et al., CVPR 2019
    taylor         sum over the layers of |w * g|, g the loss's gradient at w        Molchanov et al., CVPR 2019
    batchnorm      mean over the group's BatchNorms of |gamma_c|                     Liu et al., ICCV 2017
    random         uniform in [0, 1)

The first three are 1 on average in every layer, so that among all groups those channels go that are small beside the
others of their own layers. `taylor` is in units of the loss and `batchnorm` in those of an activation of variance 1:
they are compared among groups as they are. Molchanov et al. square the sum over a filter, for every batch; here the
absolute values are summed, since products of either sign would hide each other. torch-pruning's FPGM takes distances
between squared weights, the paper and this file between weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, fx, nn
from torch.func import functional_call

from tersor.core.errors import InputError
from tersor.core.evaluating import evaluating
from tersor.core.function_path import call_with, import_function, is_function_path
from tersor.core.objective import images_of, labels_of
from tersor.core.selection import weighted_layers
from tersor.graph.channels import Axis, Group

Importance = Literal["magnitude", "magnitude_l1", "taylor", "batchnorm", "fpgm", "random"]
FunctionPath = Annotated[str, Field(pattern=r"^[^:]+:[^:]+$")]
"""`package.module:function`, which is called as `importances` says."""

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True)
class Part:
    """What a group owns of one layer: place `places[i]` along `axis` belongs to channel `channels[i]`."""

    layer: str
    axis: Axis
    places: Tensor
    channels: Tensor


def parts(group: Group) -> list[Part]:
    """The parts of a group, one for each layer and axis."""
    found: dict[tuple[str, Axis], tuple[list[int], list[int]]] = {}
    for channel, cuts in enumerate(group.slices):
        for cut in cuts:
            places, channels = found.setdefault((cut.layer, cut.axis), ([], []))
            places += cut.channels
            channels += [channel] * len(cut.channels)
    return [
        Part(layer, axis, torch.tensor(places), torch.tensor(channels))
        for (layer, axis), (places, channels) in found.items()
    ]


def owned(weight: Tensor, part: Part) -> Tensor:
    """(places, numbers): what each place has of a tensor (C_out, C_in, ...)."""
    along = weight.transpose(0, 1) if part.axis == "in" else weight
    return along[part.places.to(weight.device)].flatten(1)


def norms(rows: Tensor, power: int) -> Tensor:
    """(places, numbers) -> (places,): sum of |w|^power."""
    return rows.abs().pow(power).sum(1)


def distances(rows: Tensor) -> Tensor:
    """(places, numbers) -> (places,): sum of the Euclidean distances to all other rows."""
    return torch.cdist(rows, rows).sum(1)


def by_channel(part: Part, scores: Tensor, channels: int) -> Tensor:
    """(places,) -> (channels,): sums over the places of a channel; 0 where it has none."""
    return torch.zeros(channels, dtype=scores.dtype).index_add_(0, part.channels, scores.cpu())


def relative(scores: Tensor) -> Tensor:
    """Scores that are 1 on average; all 0 where they are."""
    return scores / scores.mean().clamp(min=torch.finfo(scores.dtype).tiny)


def gradients(graph: fx.GraphModule, data: Iterable[Any], images: int) -> dict[str, Tensor]:
    """Layer -> gradient (C_out, C_in, ...) of the labels' mean cross entropy over up to `images` images, in eval mode.

    The network is as before, to the bit: what is differentiated are views of its weights.

    Raises:
        InputError: the data has no labels.
    """
    layers = weighted_layers(graph)
    weights = {name: layer.weight.detach().requires_grad_() for name, layer in layers.items()}
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    device = next(graph.parameters()).device
    seen = 0
    with evaluating(graph), torch.enable_grad():
        for batch in data:
            labels, some = labels_of(batch), images_of(batch)[: images - seen]
            if labels is None:
                raise InputError(
                    "importance: taylor follows the labels' loss, and the data has no labels. Give batches "
                    "(images, labels), or write importance: magnitude."
                )
            logits = functional_call(graph, {f"{name}.weight": each for name, each in weights.items()}, some.to(device))
            loss = F.cross_entropy(logits, labels[: len(some)].to(device), reduction="sum")
            each = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
            for name, gradient in zip(weights, each, strict=True):
                found[name] += gradient
            seen += len(some)
            if seen >= images:
                break
    if not seen:
        raise InputError("importance: taylor needs images with labels; none were given. Pass data=...")
    return {name: gradient / seen for name, gradient in found.items()}


@torch.no_grad()
def importances(
    kind: Importance | FunctionPath,
    graph: fx.GraphModule,
    groups: Sequence[Group],
    *,
    data: Iterable[Any],
    images: int,
    seed: int,
) -> list[Tensor | None]:
    """Of every group the importance (channels,) of its channels; None where this importance says nothing of it.

    Args:
        kind: an `Importance`, or a function of the user's as `package.module:function`. That is called for every
            group with those of `graph`, `group` and `data` that it names, and gives (channels,).
        graph: a captured network without masks and grids.
        groups: of its channels.
        data: batches of images, with labels for `taylor`.
        images: that `taylor` follows the loss of.
        seed: of `random`.

    Raises:
        InputError: there is no such importance, `taylor` has no labels, or the user's function gives something else.
    """
    if is_function_path(kind):
        function = import_function(kind)
        return [_of_the_user(kind, function, graph, group, data) for group in groups]
    if kind == "random":
        draws = [torch.Generator().manual_seed(seed + number) for number in range(len(groups))]
        return [torch.rand(len(group.slices), generator=draw) for group, draw in zip(groups, draws, strict=True)]
    if kind == "batchnorm":
        return [_of_norms(graph, group) for group in groups]
    if kind == "taylor":
        follows = gradients(graph, data, images)
        return [_of_the_loss(graph, group, follows) for group in groups]
    of_rows: dict[str, Callable[[Tensor], Tensor]] = {
        "magnitude": lambda rows: norms(rows, 2),
        "magnitude_l1": lambda rows: norms(rows, 1),
        "fpgm": distances,
    }
    return [_of_layers(graph, group, of_rows[kind]) for group in groups]


def of_weights(graph: fx.GraphModule, group: Group) -> list[tuple[Part, Tensor]]:
    """The group's convolutions and fully connected layers: what it owns of each, and the weight."""
    layers = weighted_layers(graph)
    return [(part, layers[part.layer].weight.detach()) for part in parts(group) if part.layer in layers]


def _of_layers(graph: fx.GraphModule, group: Group, score: Callable[[Tensor], Tensor]) -> Tensor:
    size = len(group.slices)
    found = [relative(by_channel(part, score(owned(weight, part)), size)) for part, weight in of_weights(graph, group)]
    return torch.stack(found).mean(0)


def _of_the_loss(graph: fx.GraphModule, group: Group, follows: Mapping[str, Tensor]) -> Tensor:
    size = len(group.slices)
    found = [
        by_channel(part, norms(owned(weight * follows[part.layer], part), 1), size)
        for part, weight in of_weights(graph, group)
    ]
    return torch.stack(found).sum(0)


def _of_norms(graph: fx.GraphModule, group: Group) -> Tensor | None:
    found: list[Tensor] = []
    for part in parts(group):
        norm = graph.get_submodule(part.layer)
        if isinstance(norm, _NORMS) and norm.affine:
            scales = norm.weight.detach()[part.places.to(norm.weight.device)]
            found.append(by_channel(part, scales.abs(), len(group.slices)))
    return torch.stack(found).mean(0) if found else None


def _of_the_user(
    path: str, function: Callable[..., Any], graph: fx.GraphModule, group: Group, data: Iterable[Any]
) -> Tensor:
    given = call_with(path, function, graph=graph, group=group, data=data)
    wanted = (len(group.slices),)
    if not isinstance(given, Tensor) or tuple(given.shape) != wanted or not torch.isfinite(given).all():
        what = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise InputError(
            f"'{path}' gave {what} for the {wanted[0]} channels of {group.root}. It should give a finite tensor of "
            f"shape {wanted}: the importance of each."
        )
    return given.detach().float().cpu()
