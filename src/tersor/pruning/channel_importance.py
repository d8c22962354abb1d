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
    obs            what the answers lose without it, the layers that read it fitted: see `optimal_brain_surgeon.py`
    random         uniform in [0, 1)

The first three are 1 on average in every layer, so that among all groups those channels go that are small beside the
others of their own layers. `taylor` is in units of the loss and `batchnorm` in those of an activation of variance 1:
they are compared among groups as they are. `obs` is in squared logits, and compared for each unit that is saved of the
cost that is asked for. Molchanov et al. square the sum over a filter, for every batch; here the absolute values are
summed, since products of either sign would hide each other. torch-pruning's FPGM takes distances between squared
weights, the paper and this file between weights.
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
from tersor.core.import_path import call_with, import_function, is_function_path
from tersor.core.progress import NO_PROGRESS, ProgressReporter
from tersor.data.batch import images_of, labels_of
from tersor.graph.batchnorm import Norm
from tersor.graph.eval_mode import evaluating
from tersor.pruning.channel_groups import Group
from tersor.pruning.optimal_brain_surgeon import losses

Importance = Literal["magnitude", "magnitude_l1", "taylor", "batchnorm", "fpgm", "obs", "random"]
FunctionPath = Annotated[str, Field(pattern=r"^[^:]+:[^:]+$")]
"""`package.module:function`, which is called as `importances` says."""

FOR_THE_COST: tuple[Importance, ...] = ("obs",)
"""Those of which groups are compared by what is lost for each unit of the cost that is saved."""

_READS = ("in", "1")


@dataclass(frozen=True)
class Part:
    """What a group owns of one weight: place `places[i]` along `axis` belongs to channel `channels[i]`.

    Attributes:
        layer: by whose name it is cut: a layer, or the weight itself where it belongs to a larger module.
        axis: `out` or `0`, the rows; `in` or `1`, the columns that read.
        weight: (C_out, C_in / groups, ...), or (C,) of a norm.
        groups: of a convolution: each group of rows reads columns of its own.
    """

    layer: str
    axis: str
    weight: nn.Parameter
    groups: int
    places: Tensor
    channels: Tensor

    def rows(self, values: Tensor) -> Tensor:
        """(places, numbers): what each place has of `values`, of the weight's shape."""
        if self.axis not in _READS:
            return values.reshape(len(values), -1)[self.places.to(values.device)]
        by_group = values.reshape(self.groups, -1, *values.shape[1:]).transpose(1, 2)
        return by_group.flatten(0, 1).flatten(1)[self.places.to(values.device)]

    def spread(self, values: Tensor) -> Tensor:
        """(channels,) -> the value of its channel at every number of the weight that a channel owns, 0 elsewhere."""
        rows, *others = self.weight.shape
        reads = self.axis in _READS
        line = torch.zeros(self.groups * others[0] if reads else rows, dtype=values.dtype)
        line[self.places] = values.cpu()[self.channels]
        if reads:
            lines = line.reshape(self.groups, -1).repeat_interleave(rows // self.groups, 0)
            return lines.reshape(rows, -1, *[1] * (len(others) - 1)).to(self.weight)
        return line.reshape(-1, *[1] * len(others)).to(self.weight)

    def summed(self, scores: Tensor, channels: int) -> Tensor:
        """(places,) -> (channels,): sums over the places of a channel."""
        return torch.zeros(channels, dtype=scores.dtype).index_add_(0, self.channels, scores.cpu())


def parts(graph: fx.GraphModule, group: Group) -> list[Part]:
    """What a group owns of every convolution, fully connected layer, BatchNorm, and of matrices that lie in a larger
    module (attention); in that order in which the group names them.
    """
    found: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
    for channel, cuts in enumerate(group.slices):
        for cut in cuts:
            places, channels = found.setdefault((cut.layer, cut.axis), ([], []))
            places += cut.channels
            channels += [channel] * len(cut.channels)
    made: list[Part] = []
    for (layer, axis), (places, channels) in found.items():
        weight, groups = _weight(graph, layer)
        if weight is not None and axis in (*_READS, "out", "0"):
            made.append(Part(layer, axis, weight, groups, torch.tensor(places), torch.tensor(channels)))
    return made


def _weight(graph: fx.GraphModule, name: str) -> tuple[nn.Parameter | None, int]:
    """The weight that a name in a cut means, and in how many groups it reads."""
    module: Any = graph
    for step in name.split("."):
        module = getattr(module, step, None)
    weight = module if name.endswith("weight") else None
    if isinstance(module, nn.Conv2d | nn.Linear | Norm):
        weight = module.weight
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    return (weight, groups) if isinstance(weight, nn.Parameter) else (None, 1)


def matrices(graph: fx.GraphModule, group: Group) -> list[Part]:
    """The parts that weigh: all but those of BatchNorms."""
    return [part for part in parts(graph, group) if part.weight.ndim > 1]


def norms(rows: Tensor, power: int) -> Tensor:
    """(places, numbers) -> (places,): sum of |w|^power."""
    return rows.abs().pow(power).sum(1)


def distances(rows: Tensor) -> Tensor:
    """(places, numbers) -> (places,): sum of the Euclidean distances to all other rows."""
    return torch.cdist(rows, rows).sum(1)


def relative(scores: Tensor) -> Tensor:
    """Scores that are 1 on average; all 0 where they are."""
    return scores / scores.mean().clamp(min=torch.finfo(scores.dtype).tiny)


def gradients(graph: fx.GraphModule, data: Iterable[Any], images: int) -> dict[nn.Parameter, Tensor]:
    """Parameter -> gradient of the labels' mean cross entropy over up to `images` images, in eval mode.

    The network is as before, to the bit: what is differentiated are views of its parameters.

    Raises:
        InputError: the data has no labels.
    """
    parameters = dict(graph.named_parameters())
    views = {name: each.detach().requires_grad_() for name, each in parameters.items()}
    found = {name: torch.zeros_like(view) for name, view in views.items()}
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
            logits = functional_call(graph, views, some.to(device))
            loss = F.cross_entropy(logits, labels[: len(some)].to(device), reduction="sum")
            each = torch.autograd.grad(loss, list(views.values()), materialize_grads=True)
            for name, gradient in zip(views, each, strict=True):
                found[name] += gradient
            seen += len(some)
            if seen >= images:
                break
    if not seen:
        raise InputError("importance: taylor needs images with labels; none were given. Pass data=...")
    return {parameters[name]: gradient / seen for name, gradient in found.items()}


@torch.no_grad()
def importances(
    kind: Importance | FunctionPath,
    graph: fx.GraphModule,
    groups: Sequence[Group],
    *,
    data: Iterable[Any],
    images: int,
    seed: int,
    progress: ProgressReporter = NO_PROGRESS,
) -> list[Tensor | None]:
    """Of every group the importance (channels,) of its channels; None where this importance says nothing of it.

    Args:
        kind: an `Importance`, or a function of the user's as `package.module:function`. That is called for every
            group with those of `graph`, `group` and `data` that it names, and gives (channels,).
        graph: a captured network without masks and grids.
        groups: of its channels.
        data: batches of images, with labels for `taylor`.
        images: that `taylor` and `obs` look at.
        seed: of `random`.
        progress: reports the passes of `obs`.

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
    if kind == "obs":
        return losses(graph, groups, data, images, progress)
    if kind == "taylor":
        follows = gradients(graph, data, images)
        return [_of_the_loss(graph, group, follows) for group in groups]
    of_rows: dict[str, Callable[[Tensor], Tensor]] = {
        "magnitude": lambda rows: norms(rows, 2),
        "magnitude_l1": lambda rows: norms(rows, 1),
        "fpgm": distances,
    }
    return [_of_layers(graph, group, of_rows[kind]) for group in groups]


def _of_layers(graph: fx.GraphModule, group: Group, score: Callable[[Tensor], Tensor]) -> Tensor | None:
    size = len(group.slices)
    found = [relative(part.summed(score(part.rows(part.weight.detach())), size)) for part in matrices(graph, group)]
    return torch.stack(found).mean(0) if found else None


def _of_the_loss(graph: fx.GraphModule, group: Group, follows: Mapping[nn.Parameter, Tensor]) -> Tensor | None:
    size = len(group.slices)
    found = [
        part.summed(norms(part.rows(part.weight.detach() * follows[part.weight]), 1), size)
        for part in matrices(graph, group)
    ]
    return torch.stack(found).sum(0) if found else None


def _of_norms(graph: fx.GraphModule, group: Group) -> Tensor | None:
    size = len(group.slices)
    found = [
        part.summed(part.weight.detach().abs()[part.places.to(part.weight.device)], size)
        for part in parts(graph, group)
        if part.weight.ndim == 1
    ]
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
