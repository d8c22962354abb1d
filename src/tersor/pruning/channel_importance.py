"""Importance of coupled channels: one score for each channel of a group; the lowest are removed first.

A channel has rows of the layers that produce it and columns of the layers that consume it. Each layer W (C_out, C_in,
...) is scored index by index; several indices of one channel (a column for every pixel, after a flatten) are summed.

    magnitude      mean over the layers of ||W[c]||_2^2 / mean_c ||W[c]||_2^2
    magnitude_l1   mean over the layers of ||W[c]||_1 / mean_c ||W[c]||_1            Li et al., ICLR 2017
    fpgm           mean over the layers of D_c / mean_c D_c, where D_c = sum_d ||W[c] - W[d]||_2: filters near the
                   geometric median are replaceable                                  He et al., CVPR 2019
    taylor         sum over the layers of |w * g|, g the task loss's gradient at w   Molchanov et al., CVPR 2019
    batchnorm      mean over the group's BatchNorms of |gamma_c|                     Liu et al., ICCV 2017
    obs            loss increase after the following layers are refitted: see `optimal_brain_surgeon.py`
    random         uniform in [0, 1)

The first three are normalized to a mean of 1 in every layer, so that layers are comparable. Across groups, `taylor` (a
change of the loss) and `batchnorm` (the scale of an activation of variance 1) are compared without normalization. `obs`
(a change of squared logits, or the relative squared error of outputs without logits) is divided by the saved cost.
Molchanov et al. square the sum over a filter, for every batch; here absolute values are summed, since products of
opposite signs would cancel. torch-pruning's FPGM takes distances between squared weights, the paper and this file
between weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from tersor.core.errors import InputError
from tersor.core.import_path import call_with, import_function, is_function_path
from tersor.core.progress import NO_PROGRESS, ProgressReporter
from tersor.graph.batchnorm import Norm
from tersor.graph.layer_selection import Convolution, Layer, TransposedConvolution
from tersor.pruning.channel_groups import Group
from tersor.pruning.optimal_brain_surgeon import loss_increases
from tersor.pruning.weight_importance import accumulate_gradients
from tersor.tasks.classification import CLASSIFICATION
from tersor.tasks.task import Task

Importance = Literal["magnitude", "magnitude_l1", "taylor", "batchnorm", "fpgm", "obs", "random"]
FunctionPath = Annotated[str, Field(pattern=r"^[^:]+:[^:]+$")]
"""`package.module:function`; see `importances`."""

COMPARED_BY_COST: tuple[Importance, ...] = ("obs",)
"""Importances that are divided by the saved cost when groups are compared."""

_READS = ("in", "1")
_TRANSPOSED = {"in": "out", "out": "in"}
_ARGUMENTS = (
    "graph is the captured network (torch.fx.GraphModule), group is one group of its channels, data are batches of "
    "images. Return one score for each of group.slices, such as: def random(group): return "
    "torch.rand(len(group.slices))."
)
"""What a user's function is called with."""


@dataclass(frozen=True)
class WeightSlice:
    """The slices of a group in one weight: index `indices[i]` along `axis` belongs to channel `channels[i]`.

    Attributes:
        layer: name in the cut: a layer, or the weight itself where it belongs to a larger module.
        axis: `out` or `0`, rows; `in` or `1`, columns. A transposed convolution has its inputs in rows.
        weight: (C_out, C_in / groups, ...), or (C,) of a norm; (C_in, C_out, ...) of a transposed convolution.
        groups: number of groups of a convolution.
        indices: index along the axis, for every slice.
        channels: channel of the group, for every slice.
    """

    layer: str
    axis: str
    weight: nn.Parameter
    groups: int
    indices: Tensor
    channels: Tensor

    def rows(self, values: Tensor) -> Tensor:
        """Values of the weight's shape, as one row for each index: (indices, numbers)."""
        if self.axis not in _READS:
            return values.reshape(len(values), -1)[self.indices.to(values.device)]
        by_group = values.reshape(self.groups, -1, *values.shape[1:]).transpose(1, 2)
        return by_group.flatten(0, 1).flatten(1)[self.indices.to(values.device)]

    def expand(self, values: Tensor) -> Tensor:
        """(channels,) -> broadcastable to the weight: the value of the channel at its slices, 0 elsewhere."""
        rows, *others = self.weight.shape
        reads = self.axis in _READS
        line = torch.zeros(self.groups * others[0] if reads else rows, dtype=values.dtype)
        line[self.indices] = values.cpu()[self.channels]
        if reads:
            lines = line.reshape(self.groups, -1).repeat_interleave(rows // self.groups, 0)
            return lines.reshape(rows, -1, *[1] * (len(others) - 1)).to(self.weight)
        return line.reshape(-1, *[1] * len(others)).to(self.weight)

    def sum_by_channel(self, scores: Tensor, channels: int) -> Tensor:
        """(indices,) -> (channels,)."""
        return torch.zeros(channels, dtype=scores.dtype).index_add_(0, self.channels, scores.cpu())


def weight_slices(graph: fx.GraphModule, group: Group) -> list[WeightSlice]:
    """The slices of (transposed) convolutions, fully connected layers, BatchNorms and attention's weight matrices."""
    by_axis: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
    for channel, cuts in enumerate(group.slices):
        for cut in cuts:
            indices, channels = by_axis.setdefault((cut.layer, cut.axis), ([], []))
            indices += cut.channels
            channels += [channel] * len(cut.channels)
    slices: list[WeightSlice] = []
    for (layer, axis), (indices, channels) in by_axis.items():
        weight, groups = _weight(graph, layer)
        if weight is not None and axis in (*_READS, "out", "0"):
            if axis in _TRANSPOSED and isinstance(graph.get_submodule(layer), TransposedConvolution):
                axis = _TRANSPOSED[axis]
            slices.append(WeightSlice(layer, axis, weight, groups, torch.tensor(indices), torch.tensor(channels)))
    return slices


def _weight(graph: fx.GraphModule, name: str) -> tuple[nn.Parameter | None, int]:
    """The weight that a name in a cut means, and its number of groups."""
    module: Any = graph
    for step in name.split("."):
        module = getattr(module, step, None)
    weight = module if name.endswith("weight") else None
    if isinstance(module, Layer | TransposedConvolution | Norm):
        weight = module.weight
    groups = module.groups if isinstance(module, Convolution) else 1
    return (weight, groups) if isinstance(weight, nn.Parameter) else (None, 1)


def matrix_slices(graph: fx.GraphModule, group: Group) -> list[WeightSlice]:
    """All slices but those of BatchNorms."""
    return [part for part in weight_slices(graph, group) if part.weight.ndim > 1]


def row_norms(rows: Tensor, power: int) -> Tensor:
    """(indices, numbers) -> (indices,): sum of |w|^power."""
    return rows.abs().pow(power).sum(1)


def distances(rows: Tensor) -> Tensor:
    """(indices, numbers) -> (indices,): sum of the Euclidean distances to all other rows."""
    return torch.cdist(rows, rows).sum(1)


def relative(scores: Tensor) -> Tensor:
    """Scores divided by their mean; zeros if all are zero."""
    return scores / scores.mean().clamp(min=torch.finfo(scores.dtype).tiny)


def gradients(
    graph: fx.GraphModule, data: Iterable[Any], images: int, task: Task = CLASSIFICATION
) -> dict[nn.Parameter, Tensor]:
    """Parameter -> gradient of the task's loss, averaged over up to `images` images, in eval mode.

    Raises:
        InputError: the data has no images or no targets, or the task's loss cannot be used.
    """
    parameters = dict(graph.named_parameters())
    sums, count = accumulate_gradients(graph, parameters, data, images, whole_batches=False, task=task)
    return {parameters[name]: gradient / count for name, gradient in sums.items()}


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
    task: Task = CLASSIFICATION,
) -> list[Tensor | None]:
    """The importance (channels,) of every group; None where this importance does not apply to it.

    Args:
        kind: an `Importance`, or a user's function as `package.module:function`. It is called for every group with
            those of `graph`, `group` and `data` that it accepts, and returns (channels,).
        graph: a captured network without masks and quantizers.
        groups: groups of its channels.
        data: batches of images, with targets for `taylor`.
        images: used by `taylor` and `obs`.
        seed: seed of `random`.
        progress: reports the passes of `obs`.
        task: gives the loss of `taylor` and the logits of `obs`.

    Raises:
        InputError: the function does not exist or returns something else, or `taylor` has no targets.
    """
    if is_function_path(kind):
        function = import_function(kind)
        return [_user_scores(kind, function, graph, group, data) for group in groups]
    if kind == "random":
        draws = [torch.Generator().manual_seed(seed + number) for number in range(len(groups))]
        return [torch.rand(len(group.slices), generator=draw) for group, draw in zip(groups, draws, strict=True)]
    if kind == "obs":
        return loss_increases(graph, groups, data, images, progress, task)
    if kind == "taylor":
        by_parameter = gradients(graph, data, images, task)
        return [_taylor(graph, group, by_parameter) for group in groups]
    if kind == "batchnorm":
        return [_batchnorm(graph, group) for group in groups]
    scores: dict[str, Callable[[Tensor], Tensor]] = {
        "magnitude": lambda rows: row_norms(rows, 2),
        "magnitude_l1": lambda rows: row_norms(rows, 1),
        "fpgm": distances,
    }
    return [_mean_over_layers(graph, group, scores[kind]) for group in groups]


def _mean_over_layers(graph: fx.GraphModule, group: Group, score: Callable[[Tensor], Tensor]) -> Tensor | None:
    size = len(group.slices)
    parts = matrix_slices(graph, group)
    scores = [relative(part.sum_by_channel(score(part.rows(part.weight.detach())), size)) for part in parts]
    return torch.stack(scores).mean(0) if scores else None


def _taylor(graph: fx.GraphModule, group: Group, by_parameter: Mapping[nn.Parameter, Tensor]) -> Tensor | None:
    size = len(group.slices)
    scores = [
        part.sum_by_channel(row_norms(part.rows(part.weight.detach() * by_parameter[part.weight]), 1), size)
        for part in matrix_slices(graph, group)
    ]
    return torch.stack(scores).sum(0) if scores else None


def _batchnorm(graph: fx.GraphModule, group: Group) -> Tensor | None:
    size = len(group.slices)
    scores = [
        part.sum_by_channel(part.weight.detach().abs()[part.indices.to(part.weight.device)], size)
        for part in weight_slices(graph, group)
        if part.weight.ndim == 1
    ]
    return torch.stack(scores).mean(0) if scores else None


def _user_scores(
    path: str, function: Callable[..., Any], graph: fx.GraphModule, group: Group, data: Iterable[Any]
) -> Tensor:
    scores = call_with(path, function, _ARGUMENTS, graph=graph, group=group, data=data)
    shape = (len(group.slices),)
    if not isinstance(scores, Tensor) or tuple(scores.shape) != shape or not torch.isfinite(scores).all():
        what = f"a tensor of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(
            f"'{path}' returned {what} for the {shape[0]} channels of {group.root}. Return a finite tensor of "
            f"shape {shape}: the importance of each channel."
        )
    return scores.detach().float().cpu()
