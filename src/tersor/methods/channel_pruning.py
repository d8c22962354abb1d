"""Channel pruning: the channels that matter least are removed for real, from every layer that shares them.

Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (magnitude of filters); Fang et al., "DepGraph: Towards
Any Structural Pruning", CVPR 2023 (coupled channels are scored and removed together).

    I_c = mean over the layers of the group of ||W[c]||_2^2 / mean_c ||W[c]||_2^2      W: (C_out, C_in, ...)
    W[c]  the rows that write channel c, the columns that read it

This is `magnitude`; `pruning/channel_importance.py` has the formulas and papers of the others, and takes a function of
yours. Channels go in blocks, so that a multiple of `round_to` stays: runtimes compute ragged widths slowly (a ResNet-18
with 47 % of its channels gone took 17.6 ms in ONNX Runtime unrounded, 6.7 ms with 50 % gone and rounded to 8;
bench/pruning_rounding.py measures 1, 4, 8 and 16). One after the other the block goes that is next: of the group that
has lost the smallest fraction (scope `layer`), or of lowest importance (`global`; `obs` by what it saves), until the
network is at least as small as asked. No group falls below `floor`.

`keep_latency` is a fraction of the latency, at batch size 1 in the target's runtime, that the network had when it came
here: copies of it are cut to a few fractions of its MACs, and timed in turns with it (`latency_ratio.py`).

With `branches`, as many residual branches go whole before (`pruning/residual_branches.py`): those that the answers
change least without, for each MAC (or parameter) that they cost. Half of a ResNet-56's MACs gone by `obs` and `global`,
it takes 1.05 of the time of one with half of every layer (ONNX Runtime, AVX2, batch 32); where two branches went
before, 0.99.

What the removed channels gave is given by those that stay, by least squares (`pruning/least_squares.py`), and
BatchNorm's statistics are moved so that it gives what it gave, by mean and spread on training images
(`graph/batchnorm_statistics.py`).

DepGraph's code also weighs the scores of a group by BatchNorm and reports the best test epoch; neither is done here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, fx, nn

from tersor.core.errors import InputError
from tersor.core.progress import ProgressReporter
from tersor.data.batch import images_of
from tersor.evaluation.costs import Costs, costs
from tersor.graph.capture import capture
from tersor.graph.comparison import FEW, require_same
from tersor.pruning.budget import meet_cost, meet_latency
from tersor.pruning.channel_groups import Cut, Group, copied, remove
from tersor.pruning.channel_importance import FOR_THE_COST, FunctionPath, Importance, importances
from tersor.pruning.channel_selection import Order, Scope, left, ordered, prices, refuse_what_lies_on, removable
from tersor.pruning.residual_branches import Branch, branches, removal_cost
from tersor.pruning.shortfall import shortfall
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.method import PLAIN_VALUES
from tersor.training.removal_attachment import RemovalAttachment


@dataclass(frozen=True, config=PLAIN_VALUES)
class ChannelPruning:
    """Removal of channels until a fraction of the MACs, parameters, channels or of the latency stays."""

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
    exclude: Annotated[tuple[str, ...], Field(description="patterns of layers whose channels stay")] = ()
    branches: Annotated[
        int, Field(ge=0, description="residual branches that go whole before: those least missed for what they cost")
    ] = 0
    importance_images: Annotated[
        int, Field(ge=1, description="images for `importance: taylor` and `obs`, and for `branches`")
    ] = 256
    estimation_images: Annotated[
        int, Field(ge=1, description="images for what channels gave, and BatchNorm's statistics")
    ] = 1024
    seed: Annotated[int, Field(ge=0, lt=2**32, description="of `importance: random`")] = 0

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Captures the network and removes channels, every Parameter object the same; before an optimizer exists.

        Raises:
            InputError: two targets or one that cannot be met, no data, masks or grids on the network, a network whose
                channels cannot be followed, fewer branches than are to go or one image to tell them by, answers that
                are no logits or not finite, `keep_latency` without latency measurements. The network is as it was.
        """
        kind, keep = self._target()
        first = next(iter(context.data), None) if context.data is not None else None
        if first is None or context.data is None:
            raise InputError("channel_pruning needs images to run the network on; none were given. Pass data=...")
        if kind == "latency" and context.latency is None:
            raise InputError(
                "keep_latency needs latency measurements, and the context has none. Pass AttachContext(..., "
                "latency=tersor.evaluation.latency_ratio.latency_ratio), or write keep_macs."
            )
        graph, example = _captured(model, images_of(first)), images_of(first)[:1]
        if keep == 1 and not self.branches:
            return Attachment(graph)
        refuse_what_lies_on(graph, "channel_pruning")
        before, left_over = copied(graph), graph
        gone = self._least_missed(kind, graph, example, context.data, context.progress) if self.branches else []
        notes = [f"gone whole: the branches from {', '.join(map(str, gone))}"] if gone else []
        if gone:  # from a copy: what is refused below is as it was
            left_over = copied(graph)
            remove(left_over, [branch.cut for branch in gone])
        cuts, enough = list[Cut](), False
        if gone and kind in ("macs", "parameters"):
            enough = _fraction(kind, costs(graph, example), costs(left_over, example)) <= keep
        if not enough:
            groups, whole = removable(left_over, example, self.exclude, "channel_pruning")
            spent = costs(graph, example)
            now = costs(left_over, example) if gone else spent
            scores = importances(
                self.importance,
                left_over,
                groups,
                data=context.data,
                images=self.importance_images,
                seed=self.seed,
                progress=context.progress,
            )
            order = self._order(kind, left_over, now, groups, whole, scores)
            timed = context.latency if kind == "latency" else None
            ratio = (lambda network: timed(network, before, example, context.target)) if timed else None
            blocks, found, told = _enough(kind, spent, now, left_over, order, example, keep, ratio)
            if found > keep:
                raise self._unreached(kind, keep, found, spent, left_over, order, example, whole)
            total = sum(len(group.slices) for group in order.groups)
            told.insert(0, f"{total - sum(map(len, order.gone(blocks)))} of {total} removable channels stay")
            notes = [
                *told,
                *notes,
                *(f"left whole: the channels of {root}, since {why}" for root, why in whole.items()),
            ]
            cuts = order.cuts(blocks)
        for each in ([branch.cut for branch in gone], cuts):
            if each:
                remove(graph, each)
        return RemovalAttachment(graph, before, cuts, context, self.estimation_images, tuple(notes))

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

    def _least_missed(
        self, kind: str, graph: fx.GraphModule, example: Tensor, data: Iterable[Any], progress: ProgressReporter
    ) -> list[Branch]:
        """The branches that go, in the order of the graph."""
        found = branches(graph, example)
        if len(found) < self.branches:
            there = f"{len(found)} that can: {found[0]} ... {found[-1]}" if found else "none that can"
            raise InputError(
                f"branches: {self.branches} residual branches are to go, and {type(graph).__name__} has {there}. "
                "Write fewer."
            )
        spent, rates = costs(graph, example), dict[Branch, float]()
        changes = removal_cost(graph, found, data, self.importance_images, progress)
        for branch, change in zip(found, changes, strict=True):
            network = copied(graph)
            remove(network, [branch.cut])
            rates[branch] = change / max(1 - _fraction(kind, spent, costs(network, example)), 1e-9)
        least = set(sorted(found, key=rates.__getitem__)[: self.branches])
        return [branch for branch in found if branch in least]

    def _order(
        self,
        kind: str,
        graph: fx.GraphModule,
        spent: Costs,
        groups: list[Group],
        whole: dict[str, str],
        scores: Sequence[Tensor | None],
    ) -> Order:
        """In which order channels go; groups of which the importance says nothing are added to `whole`."""
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
        each = None
        if self.importance in FOR_THE_COST and self.scope == "global":
            each = prices("macs" if kind == "latency" else kind, graph, chosen, _macs(spent))
        return ordered(chosen, found, scope=self.scope, round_to=self.round_to, floor=self.floor, prices=each)

    def _unreached(
        self,
        kind: str,
        keep: float,
        found: float,
        spent: Costs,
        graph: fx.GraphModule,
        order: Order,
        example: Tensor,
        whole: Mapping[str, str],
    ) -> InputError:
        """What to tell where `found` stays of what was `spent` once all channels of `graph` are gone that may go."""
        layers = costs(order.without(graph, len(order.blocks)), example).layers
        of = {each.name: each.parameters if kind == "parameters" else each.macs for each in layers}
        what, total = ("parameters", spent.parameters) if kind == "parameters" else ("MACs", spent.macs)
        shares = {name: cost / total for name, cost in of.items()}
        cuts = [cut for group in order.groups for cut in group.slices[0]]
        held = shortfall(graph, shares, cuts, whole, self.exclude)
        finer = ", or a lower `floor` or `round_to`" if self.floor or self.round_to > 1 else ""
        return InputError(
            f"keep_{kind}: {keep:g} cannot be met: {found:.3f} stay when all goes that may, {found - keep:.3f} more "
            f"than asked. What stays of all {what}: {held}. Write {math.ceil(1000 * found) / 1000:.3f} or "
            f"more{finer}."
        )


def _captured(model: nn.Module, images: Tensor) -> fx.GraphModule:
    """The graph of `model`, compared with it on a few images."""
    graph = capture(model)
    require_same(graph, model, images[:FEW].to(next(graph.parameters()).device))
    return graph


def _enough(
    kind: str,
    spent: Costs,
    now: Costs,
    graph: fx.GraphModule,
    order: Order,
    example: Tensor,
    keep: float,
    ratio: Callable[[nn.Module], float] | None,
) -> tuple[int, float, list[str]]:
    """The blocks without which at most `keep` of what was `spent` stays, if any will do; what stays, what to say of it.

    Args:
        now: what `graph` costs, which has lost its branches.
        ratio: a network's latency as a fraction of what it was, if that is the cost.
    """
    share = 1.0 if kind == "channels" else _fraction(kind, spent, now)
    stays = [share * each for each in left("macs" if ratio else kind, graph, order, _macs(now))]

    def really(blocks: int) -> float:
        if kind == "channels":
            return stays[blocks]
        return _fraction(kind, spent, costs(order.without(graph, blocks), example))

    if ratio is not None:
        blocks, found = meet_latency(stays, lambda blocks: ratio(order.without(graph, blocks)), keep)
    else:
        blocks, found = meet_cost(stays, really, keep)
    told: list[str] = []
    if ratio is not None:
        told.append(
            f"{found:.3f} of the latency at batch size 1 stays, as measured, and {stays[blocks]:.3f} of the MACs"
        )
    if spent.uncounted and kind in ("macs", "latency"):
        told.append(f"the MACs are without these, which have no count: {', '.join(spent.uncounted)}")
    return blocks, found, told


def _fraction(kind: str, spent: Costs, now: Costs) -> float:
    """How much there is of the parameters, or else of the MACs, that there were."""
    return now.parameters / spent.parameters if kind == "parameters" else now.macs / spent.macs


def _macs(spent: Costs) -> dict[str, int]:
    return {layer.name: layer.macs for layer in spent.layers}
