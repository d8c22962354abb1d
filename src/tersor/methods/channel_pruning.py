"""Channel pruning: the channels that matter least are removed for real, from every layer that shares them.

Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (magnitude of filters); Fang et al., "DepGraph: Towards
Any Structural Pruning", CVPR 2023 (coupled channels are scored and removed together).

    I_c = mean over the layers of the group of ||W[c]||_2^2 / mean_c ||W[c]||_2^2      W: (C_out, C_in, ...)
    W[c]  the rows that write channel c, the columns that read it

Channels go in blocks of `round_to`, since runtimes compute ragged widths slowly. One after the other the block goes
that is next: of the group that has lost the smallest fraction (scope `layer`), or of lowest importance (`global`),
until the network is at least as small as asked. No group falls below `floor`. BatchNorm's statistics, which the
missing channels have shifted, are estimated anew on training images.

DepGraph's code also weighs the scores of a group by BatchNorm and reports the best test epoch; neither is done here.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.utils import parametrize

from tersor.core.attachment import Attachment, Progress
from tersor.core.errors import InputError
from tersor.core.method import PLAIN_VALUES
from tersor.core.objective import images_of
from tersor.core.parametrization import FakeQuantize
from tersor.core.selection import matching
from tersor.core.target import Target
from tersor.graph.capture import capture
from tersor.graph.channels import Group, copied, coupled_channels, energies, merged, remove
from tersor.measure import costs


@dataclass(frozen=True, config=PLAIN_VALUES)
class ChannelPruning:
    """Removal of channels until a fraction of the MACs, parameters or channels stays."""

    example: ClassVar[dict[str, Any]] = {"keep_macs": 0.7, "scope": "global", "round_to": 4}
    off: ClassVar[dict[str, Any]] = {"keep_macs": 1.0}

    keep_macs: Annotated[float | None, Field(gt=0, le=1, description="fraction that stays; 0.5 if none is given")] = (
        None
    )
    keep_parameters: Annotated[float | None, Field(gt=0, le=1, description="fraction that stays")] = None
    keep_channels: Annotated[float | None, Field(gt=0, le=1, description="fraction that stays, of the removable")] = (
        None
    )
    importance: Annotated[Literal["magnitude", "random"], Field(description="which go first")] = "magnitude"
    scope: Annotated[
        Literal["layer", "global"], Field(description="the same fraction everywhere, or the least important anywhere")
    ] = "layer"
    round_to: Annotated[int, Field(ge=1, description="channels that stay are a multiple of it")] = 8
    floor: Annotated[float, Field(ge=0, lt=1, description="fraction of a group that always stays")] = 0.1
    exclude: Annotated[tuple[str, ...], Field(description="patterns of layers whose channels stay")] = ()
    estimation_images: Annotated[int, Field(ge=1, description="images for BatchNorm's statistics")] = 1024
    seed: Annotated[int, Field(ge=0, description="of `importance: random`")] = 0

    def attach(
        self,
        model: nn.Module,
        *,
        data: Iterable[Any] | None = None,
        teacher: nn.Module | None = None,
        steps: int = 0,
        target: Target | None = None,
    ) -> ChannelPruningAttachment:
        """Captures the network and removes channels, every Parameter object the same; before an optimizer exists.

        Raises:
            InputError: two targets or one that cannot be met, no data, masks or grids on the network, a network whose
                channels cannot be followed.
        """
        kind, keep = self._target()
        first = next(iter(data), None) if data is not None else None
        if first is None or data is None:
            raise InputError("channel_pruning needs images to run the network on; none were given. Pass data=...")
        _refuse_masks_and_grids(model)
        graph = capture(model)
        if keep == 1:
            return ChannelPruningAttachment(self, graph, data, cut=False)
        example = images_of(first)[:1]
        groups, whole = coupled_channels(graph, example)
        groups = self._chosen(graph, groups)
        cost = _cost(kind, graph, groups, example)
        known: dict[tuple[str, str], Tensor | None] = {}
        scores = [self._scores(graph, group, number, known) for number, group in enumerate(groups)]
        removed = self._selected(groups, scores, cost, keep, kind)
        remove(graph, merged(cut for group, gone in zip(groups, removed, strict=True) for cut in group.cuts(gone)))
        kept = sum(len(group.slices) for group in groups) - sum(map(len, removed))
        notes = [f"{kept} of {sum(len(group.slices) for group in groups)} removable channels stay"]
        notes += [f"left whole: the channels of {root}, since {why}" for root, why in whole.items()]
        return ChannelPruningAttachment(self, graph, data, notes=tuple(notes))

    def _target(self) -> tuple[str, float]:
        given = {
            kind: keep
            for kind, keep in (
                ("macs", self.keep_macs),
                ("parameters", self.keep_parameters),
                ("channels", self.keep_channels),
            )
            if keep is not None
        }
        if len(given) > 1:
            raise InputError(f"channel_pruning has one target, given keep_{' and keep_'.join(given)}. Write one.")
        return next(iter(given.items()), ("macs", 0.5))

    def _chosen(self, graph: fx.GraphModule, groups: list[Group]) -> list[Group]:
        excluded = (
            matching(self.exclude, [name for name, _ in graph.named_modules() if name]) if self.exclude else set()
        )
        chosen = [group for group in groups if not any(cut.layer in excluded for cut in group.cuts([0]))]
        if not chosen:
            raise InputError(
                f"no channel of {type(graph).__name__} can be removed. Possible: weight_pruning, which masks"
                + (", or a shorter `exclude`." if self.exclude else ".")
            )
        return chosen

    @torch.no_grad()
    def _scores(
        self, graph: fx.GraphModule, group: Group, number: int, known: dict[tuple[str, str], Tensor | None]
    ) -> Tensor:
        """(channels,): 1 on average. `known` are the energies of places that groups share."""
        if self.importance == "random":
            return torch.rand(len(group.slices), generator=torch.Generator().manual_seed(self.seed + number))
        found: list[Tensor] = []
        for position, cut in enumerate(group.slices[0]):
            if (cut.layer, cut.axis) not in known:
                known[cut.layer, cut.axis] = energies(graph, cut)
            energy = known[cut.layer, cut.axis]
            if energy is not None:
                each = energy[torch.tensor([parts[position].channels for parts in group.slices])].sum(1)
                found.append(each / each.mean().clamp(min=torch.finfo(each.dtype).tiny))
        return torch.stack(found).mean(0).cpu()

    def _selected(
        self,
        groups: list[Group],
        scores: list[Tensor],
        cost: Callable[[list[list[int]]], float],
        keep: float,
        kind: str,
    ) -> list[list[int]]:
        """The channels of each group that go, so that at most `keep` of the cost stays."""
        orders = [each.argsort(stable=True).tolist() for each in scores]
        blocks = sorted(
            (priority, number, end)
            for number, (group, score) in enumerate(zip(groups, scores, strict=True))
            for priority, end in self._blocks(group, score.sort().values)
        )

        def gone(count: int) -> list[list[int]]:
            ends = {number: end for _, number, end in blocks[:count]}
            return [order[: ends.get(number, 0)] for number, order in enumerate(orders)]

        fewest = bisect_left(range(len(blocks) + 1), -keep, key=lambda count: -cost(gone(count)))
        if fewest > len(blocks):
            raise InputError(
                f"keep_{kind}: {keep:g} cannot be met: {cost(gone(len(blocks))):.3f} stay when all goes that may. "
                "Write more than that, or a lower `floor` or `round_to`."
            )
        return gone(fewest)

    def _blocks(self, group: Group, ascending: Tensor) -> Iterator[tuple[tuple[float, float], int]]:
        """When the next channels of a group go, lowest first, and how many are gone then."""
        size = len(group.slices)
        step = self.round_to // math.gcd(self.round_to, group.width)
        least = max(1, math.ceil(self.floor * size), min(size, step))
        start = 0
        for kept in range((size - 1) // step * step, least - 1, -step):
            end = size - kept
            importance = float(ascending[start:end].mean())
            yield ((end / size, importance) if self.scope == "layer" else (importance, end / size)), end
            start = end


class ChannelPruningAttachment(Attachment):
    """A network that has lost channels; `begin` estimates its BatchNorm statistics anew."""

    def __init__(
        self,
        method: ChannelPruning,
        graph: fx.GraphModule,
        data: Iterable[Any],
        *,
        notes: tuple[str, ...] = (),
        cut: bool = True,
    ) -> None:
        super().__init__(graph, notes=notes)
        self.method = method
        self.data = data
        self.cut = cut

    def begin(self) -> Iterator[Progress]:
        """One pass over the images: mean and variance of every BatchNorm, averaged over the batches."""
        norms = [
            module for module in self.model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats
        ]
        if not self.cut or not norms:
            return
        momenta = [norm.momentum for norm in norms]
        self.model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the average of all batches
            norm.train()
        done, total = 0, self.method.estimation_images
        device = next(self.model.parameters()).device
        for batch in self.data:
            images = images_of(batch)[: total - done].to(device)
            if len(images) < 2:
                break
            with torch.no_grad():
                self.model(images)
            done += len(images)
            yield Progress("BatchNorm statistics", done, total)
            if done >= total:
                break
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
        if not done:
            raise InputError("BatchNorm's statistics need batches of at least two images. Pass data=... with such.")


def _refuse_masks_and_grids(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantize) or parametrize.is_parametrized(module):
            raise InputError(
                f"{name or 'the network'} lies under a mask or a grid already, and channels are removed before. "
                "Write channel_pruning in a stage before weight_pruning, ptq and qat."
            )


def _cost(kind: str, graph: fx.GraphModule, groups: list[Group], example: Tensor) -> Callable[[list[list[int]]], float]:
    """Channels gone of each group -> fraction of the cost that stays."""
    if kind == "channels":
        sizes = [len(group.slices) for group in groups]
        return lambda gone: 1 - sum(map(len, gone)) / sum(sizes)
    spent = costs(graph, example)
    total = spent.macs if kind == "macs" else spent.parameters

    def measured(gone: list[list[int]]) -> float:
        cut = copied(graph)
        remove(cut, merged(each for group, channels in zip(groups, gone, strict=True) for each in group.cuts(channels)))
        left = costs(cut, example)
        return (left.macs if kind == "macs" else left.parameters) / total

    if not all(_by_rows_and_columns(graph, group) for group in groups):
        return measured
    macs = {layer.name: layer.macs for layer in spent.layers}
    widths = [
        {(cut.layer, cut.axis): len(cut.channels) for cut in group.slices[0] if "=" not in cut.axis} for group in groups
    ]
    layers = {name: graph.get_submodule(name) for name in sorted({name for each in widths for name, _ in each})}

    def fraction(gone: list[list[int]]) -> float:
        lost: Counter[tuple[str, str]] = Counter()
        for channels, places in zip(gone, widths, strict=True):
            for place, width in places.items():
                lost[place] += len(channels) * width
        saved = 0.0
        for name, layer in layers.items():
            sizes = [parameter.shape for parameter in layer.parameters(recurse=False)]
            rows = 1 - lost[name, "out"] / sizes[0][0] if sizes else 1.0
            columns = 1 - lost[name, "in"] / sizes[0][1] if sizes and len(sizes[0]) > 1 else 1.0
            if kind == "macs":
                saved += macs.get(name, 0) * (1 - rows * columns)
            else:
                saved += sum(size.numel() * (1 - rows * (columns if len(size) > 1 else 1)) for size in sizes)
        return 1 - saved / total

    return fraction


def _by_rows_and_columns(graph: fx.GraphModule, group: Group) -> bool:
    """Whether all that the group costs are rows and columns of weights: not so attention, nor a grouped convolution."""
    cuts = [cut for cut in group.slices[0] if "=" not in cut.axis]
    if group.within or not all(cut.axis in {"out", "in"} for cut in cuts):
        return False
    return all(getattr(graph.get_submodule(cut.layer), "groups", 1) == 1 for cut in cuts if cut.axis == "in")
