"""Channel pruning: the channels that matter least are removed for real, from every layer that shares them.

Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (magnitude of filters); Fang et al., "DepGraph: Towards
Any Structural Pruning", CVPR 2023 (coupled channels are scored and removed together).

    I_c = mean over the layers of the group of ||W[c]||_2^2 / mean_c ||W[c]||_2^2      W: (C_out, C_in, ...)
    W[c]  the rows that write channel c, the columns that read it

This is `magnitude`; `graph/importance.py` has the formulas and papers of the others, and takes a function of yours.
Channels go in blocks, so that a multiple of `round_to` stays: runtimes compute ragged widths slowly (a ResNet-18 with
47 % of its channels gone took 17.6 ms in ONNX Runtime unrounded, 6.7 ms with 50 % gone and rounded to 8;
bench/pruning_rounding.py measures 1, 4, 8 and 16). One after the other the block goes that is next: of the group that
has lost the smallest fraction (scope `layer`), or of lowest importance (`global`; `obs` by what it saves), until the
network is at least as small as asked. No group falls below `floor`.

`keep_latency` is a fraction of the latency, at batch size 1 in the target's runtime, that the network had when it came
here: copies of it are cut to a few fractions of its MACs, and timed in turns with it (`core/stopwatch.py`).

What the removed channels gave is given by those that stay, by least squares (`graph/takeover.py`), and BatchNorm's
statistics are moved so that it gives what it gave, by mean and spread on training images (`graph/statistics.py`).

DepGraph's code also weighs the scores of a group by BatchNorm and reports the best test epoch; neither is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, fx, nn

from tersor.core.attachment import Attachment, Progress
from tersor.core.errors import InputError
from tersor.core.method import PLAIN_VALUES
from tersor.core.objective import images_of
from tersor.core.stopwatch import Stopwatch
from tersor.core.target import Target
from tersor.graph.branches import branches
from tersor.graph.budget import fast_enough, small_enough
from tersor.graph.capture import capture
from tersor.graph.channels import Cut, Group, copied, remove
from tersor.graph.importance import FOR_THE_COST, FunctionPath, Importance, importances
from tersor.graph.latencies import saved_latency
from tersor.graph.statistics import Moments, fit, in_unit_of, moments_of_batches, with_statistics
from tersor.graph.takeover import fitted, take_over
from tersor.graph.widths import Order, Scope, left, ordered, prices, removable
from tersor.measure import Costs, costs


@dataclass(frozen=True, config=PLAIN_VALUES)
class ChannelPruning:
    """Removal of channels until a fraction of the MACs, parameters, channels or of the latency stays."""

    needs_stopwatch: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"keep_macs": 0.7, "scope": "global", "round_to": 4}
    off: ClassVar[dict[str, Any]] = {"keep_macs": 1.0}

    keep_macs: Annotated[float | None, Field(gt=0, le=1, description="fraction that stays; 0.5 if none is given")] = (
        None
    )
    keep_parameters: Annotated[float | None, Field(gt=0, le=1, description="fraction that stays")] = None
    keep_channels: Annotated[float | None, Field(gt=0, le=1, description="fraction that stays, of the removable")] = (
        None
    )
    keep_latency: Annotated[
        float | None, Field(gt=0, le=1, description="fraction that stays, at batch size 1 in the target's runtime")
    ] = None
    importance: Annotated[
        Importance | FunctionPath, Field(description="which go first; or a function of yours, package.module:function")
    ] = "magnitude"
    scope: Annotated[Scope, Field(description="the same fraction everywhere, or the least important anywhere")] = (
        "layer"
    )
    round_to: Annotated[int, Field(ge=1, description="channels that stay are a multiple of it")] = 8
    floor: Annotated[float, Field(ge=0, lt=1, description="fraction of a group that always stays")] = 0.1
    branches: Annotated[bool, Field(description="residual branches may go whole, below the floor")] = False
    price: Annotated[
        Literal["macs", "parameters", "channels", "latency"] | None,
        Field(description="of `obs`, `global`: what losses are weighed against; that of the target if none is given"),
    ] = None
    exclude: Annotated[tuple[str, ...], Field(description="patterns of layers whose channels stay")] = ()
    importance_images: Annotated[int, Field(ge=1, description="images for `importance: taylor` and `obs`")] = 256
    estimation_images: Annotated[
        int, Field(ge=1, description="images for what channels gave, and BatchNorm's statistics")
    ] = 1024
    seed: Annotated[int, Field(ge=0, description="of `importance: random`")] = 0

    def attach(
        self,
        model: nn.Module,
        *,
        data: Iterable[Any] | None = None,
        teacher: nn.Module | None = None,
        steps: int = 0,
        target: Target | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> Attachment:
        """Captures the network and removes channels, every Parameter object the same; before an optimizer exists.

        Raises:
            InputError: two targets or one that cannot be met, no data, masks or grids on the network, a network whose
                channels cannot be followed, `keep_latency` without a stopwatch.
        """
        kind, keep = self._target()
        price = self._price(kind)
        first = next(iter(data), None) if data is not None else None
        if first is None or data is None:
            raise InputError("channel_pruning needs images to run the network on; none were given. Pass data=...")
        timed = "latency" in (kind, price)
        if timed and stopwatch is None:
            raise InputError(
                "a latency is measured, and nothing was given to measure with. Pass attach(..., "
                "stopwatch=tersor.export.stopwatch.RuntimeStopwatch()), or write keep_macs, and no price: latency."
            )
        graph, example = capture(model), images_of(first)[:1]
        if keep == 1:
            return Attachment(graph)
        ratio = stopwatch.against(graph, example, target or Target()) if timed and stopwatch is not None else None
        groups, whole = removable(graph, example, self.exclude, "channel_pruning")
        order = self._order(price, graph, groups, whole, example, data, ratio)
        blocks, found = _enough(kind, graph, order, example, keep, ratio)
        if found > keep:
            raise InputError(
                f"keep_{kind}: {keep:g} cannot be met: {found:.3f} stay when all goes that may. Write more than that, "
                "or a lower `floor` or `round_to`."
            )
        notes = _told(order, blocks)
        if ratio is not None:
            latency = found if kind == "latency" else ratio(order.without(graph, blocks))
            macs = costs(order.without(graph, blocks), example).macs / costs(graph, example).macs
            notes.append(f"{latency:.3f} of the latency at batch size 1 stays, as measured, and {macs:.3f} of the MACs")
        before, cuts = copied(graph), order.cuts(blocks)
        notes += [f"left whole: the channels of {root}, since {why}" for root, why in whole.items()]
        remove(graph, cuts)
        return ChannelPruningAttachment(graph, before, cuts, data, self.estimation_images, tuple(notes))

    def _target(self) -> tuple[str, float]:
        kinds = {
            "macs": self.keep_macs,
            "parameters": self.keep_parameters,
            "channels": self.keep_channels,
            "latency": self.keep_latency,
        }
        given = {kind: keep for kind, keep in kinds.items() if keep is not None}
        if len(given) > 1:
            raise InputError(f"channel_pruning has one target, given keep_{' and keep_'.join(given)}. Write one.")
        return next(iter(given.items()), ("macs", 0.5))

    def _price(self, kind: str) -> str | None:
        """What losses are weighed against, if anything."""
        weighed = self.importance in FOR_THE_COST and self.scope == "global"
        if self.price and not weighed:
            raise InputError(
                f"price: {self.price} weighs what is lost by importance: {' or '.join(FOR_THE_COST)} in scope: global; "
                f"given importance: {self.importance}, scope: {self.scope}. Write these, or no price."
            )
        return self.price or (kind if weighed else None)

    def _order(
        self,
        price: str | None,
        graph: fx.GraphModule,
        groups: list[Group],
        whole: dict[str, str],
        example: Tensor,
        data: Iterable[Any],
        ratio: Callable[[nn.Module], float] | None,
    ) -> Order:
        """In which order channels go; groups of which the importance says nothing are added to `whole`."""
        scores = importances(self.importance, graph, groups, data=data, images=self.importance_images, seed=self.seed)
        told = [(group, each) for group, each in zip(groups, scores, strict=True) if each is not None]
        whole |= {
            group.root: f"importance: {self.importance} says nothing of them"
            for group, each in zip(groups, scores, strict=True)
            if each is None
        }
        if not told:
            raise InputError(
                f"importance: {self.importance} says nothing of any channel of this network. Write another."
            )
        chosen, found = zip(*told, strict=True)
        how: dict[str, Any] = {"round_to": self.round_to, "floor": self.floor}
        how["branches"] = branches(graph, chosen, example) if self.branches else {}
        if price == "latency" and ratio is not None:
            macs = prices("macs", graph, chosen, _macs(costs(graph, example)))
            how["saves"] = saved_latency(graph, chosen, example, ratio, macs=macs, **how)
        elif price is not None:
            each = prices(price, graph, chosen, _macs(costs(graph, example)))
            how["saves"] = lambda number, gone: max(each[number], 1e-9) * gone
        return ordered(chosen, found, scope=self.scope, **how)


def _enough(
    kind: str,
    graph: fx.GraphModule,
    order: Order,
    example: Tensor,
    keep: float,
    ratio: Callable[[nn.Module], float] | None,
) -> tuple[int, float]:
    """The blocks without which at most `keep` of a cost stays, if any will do, and what stays."""
    spent = costs(graph, example)
    if kind == "latency" and ratio is not None:
        stays = left("macs", graph, order, _macs(spent))
        return fast_enough(stays, lambda blocks: ratio(order.without(graph, blocks)), keep)
    stays = left(kind, graph, order, _macs(spent))

    def really(blocks: int) -> float:
        if kind == "channels":
            return stays[blocks]
        after = costs(order.without(graph, blocks), example)
        return after.macs / spent.macs if kind == "macs" else after.parameters / spent.parameters

    return small_enough(stays, really, keep)


def _macs(spent: Costs) -> dict[str, int]:
    return {layer.name: layer.macs for layer in spent.layers}


def _told(order: Order, blocks: int) -> list[str]:
    """What stays, and which branches do not."""
    gone = order.gone(blocks)
    total = sum(len(group.slices) for group in order.groups)
    notes = [f"{total - sum(map(len, gone))} of {total} removable channels stay"]
    pairs = zip(order.groups, gone, strict=True)
    roots = [group.root for group, each in pairs if len(each) == len(group.slices)]
    if roots:
        notes.append(f"gone whole, with the branch that they are in: the channels of {', '.join(roots)}")
    return notes


class ChannelPruningAttachment(Attachment):
    """A network that has lost channels; `begin` lets those that stay make up for them."""

    holds_shapes = True

    def __init__(
        self,
        graph: fx.GraphModule,
        before: fx.GraphModule,
        cuts: Sequence[Cut],
        data: Iterable[Any],
        images: int,
        notes: Sequence[str],
    ) -> None:
        super().__init__(graph, notes=notes)
        self.graph = graph
        self.before: fx.GraphModule | None = before
        self.cuts = cuts
        self.data = data
        self.images = images

    def begin(self) -> Iterator[Progress]:
        """Passes over the images: what the channels gave; then what reached every BatchNorm, with them and without."""
        before, graph = self.before, self.graph
        assert before is not None, "begun once"
        graph.eval()
        gone = {cut.layer: cut.channels for cut in self.cuts if cut.axis == "out"}
        seen = yield from moments_of_batches(before, self.data, self.images)
        norms = with_statistics(before)
        wanted = {name: _staying(in_unit_of(seen[name], norm), gone.get(name, ())) for name, norm in norms.items()}
        take_over(graph, (yield from fitted(before, self.cuts, self.data, self.images)))
        self.before = None
        found = yield from moments_of_batches(graph, self.data, self.images)
        for name, norm in with_statistics(graph).items():
            fit(norm, found[name], wanted[name], spreads=True)


def _staying(moments: Moments, gone: Sequence[int]) -> Moments:
    stays = torch.ones_like(moments.mean, dtype=torch.bool)
    stays[list(gone)] = False
    return Moments(moments.mean[stays], moments.spread[stays])
