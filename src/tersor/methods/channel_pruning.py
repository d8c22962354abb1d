"""Channel pruning: removes the least important channels from all layers that share them, until a budget is met.

Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (magnitude of filters); Fang et al., "DepGraph: Towards
Any Structural Pruning", CVPR 2023 (coupled channels are scored and removed together).

    group          the channels that several layers share, for example all layers whose outputs are added
    magnitude      mean over the layers of the group of ||W[c]||_2^2 / mean_c ||W[c]||_2^2        W: (C_out, C_in, ...)
    magnitude_l1   the same with ||W[c]||_1
    fpgm           the same with sum_d ||W[c] - W[d]||_2
    taylor         sum over the layers of |w * g|                       g: gradient of the task's loss at the weight w
    batchnorm      mean over the BatchNorms of the group of |gamma_c|
    obs            increase of the squared error of the logits if c is removed and the layers that read it are refitted;
                   for a task without logits, of the relative squared error of all outputs
    W[c]           the rows that produce channel c, the columns that read it; c is removed from all layers of the group

`pruning/channel_importance.py` cites the papers; `importance` can also be your own function. Channels are removed in
blocks that leave a multiple of `round_to`, since runtimes are slow at other widths (bench/pruning_rounding.py). Until
the budget is met, scope `layer` takes the next block from the group that has lost the smallest fraction, and `global`
takes the block with the lowest importance (for `obs`, per saved cost). No group falls below `floor`.

`keep_latency` is a fraction of the latency that the network had before the stage, at batch size 1 in the target's
runtime. Pruned copies with different fractions of the MACs are timed against that network in interleaved rounds.

With `branches`, that number of residual branches is removed first (`pruning/residual_branches.py`): those with the
smallest change of the outputs per saved MAC (or parameter). With `obs` and `global`, a ResNet-56 pruned to half of its
MACs was 6 % faster than one pruned to the same MACs without removing branches (ONNX Runtime, AVX2, batch 32).

The remaining channels reconstruct the removed ones by least squares (`pruning/least_squares.py`). The BatchNorm
statistics are then adjusted so that the outputs of each BatchNorm on training images keep their mean and standard
deviation (`graph/batchnorm_statistics.py`). DepGraph's code also weights the scores of a group by BatchNorm and reports
the best test epoch; neither is done here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass as record
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, fx, nn

from tersor.core.errors import InputError
from tersor.core.plain_values import plain_dataclass
from tersor.data.batch import first_batch
from tersor.data.network_inputs import NetworkInput
from tersor.evaluation.costs import Costs, costs
from tersor.graph.capture import capture
from tersor.graph.eval_mode import checked_forward
from tersor.pruning.budget import explain_shortfall, meet_cost, meet_latency
from tersor.pruning.channel_groups import Cut, Group, copy_graph, remove
from tersor.pruning.channel_importance import COMPARED_BY_COST, FunctionPath, Importance, importances
from tersor.pruning.channel_selection import (
    RemovalOrder,
    Scope,
    channel_costs,
    refuse_parametrized,
    remaining_costs,
    removable_groups,
    removal_order,
)
from tersor.pruning.residual_branches import Branch, cost_shares, find_branches, removal_cost
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.method import PLAIN_VALUES
from tersor.training.removal_attachment import RemovalAttachment

_BRANCHES = "number of residual branches to remove first: those with the smallest output error per unit of cost saved"


@record(frozen=True)
class _Budget:
    """The target: `keep` of the original network's `kind` of cost. `example`: one image (1, C, H, W)."""

    kind: str
    keep: float
    original: fx.GraphModule
    before: Costs
    example: NetworkInput
    latency_ratio: Callable[[nn.Module], float] | None

    def fraction(self, now: Costs) -> float:
        """The remaining fraction of the parameters, or else of the MACs."""
        if self.kind == "parameters":
            return now.parameters / self.before.parameters
        return now.macs / self.before.macs


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class ChannelPruning:
    """Remove the least important coupled channels until a fraction of the MACs, parameters or latency remains."""

    example: ClassVar[dict[str, Any]] = {"keep_macs": 0.7, "scope": "global", "round_to": 4}
    off: ClassVar[dict[str, Any]] = {"keep_macs": 1.0}

    keep_macs: Annotated[
        float | None, Field(gt=0, le=1, description="fraction of the MACs to keep; 0.5 if no target is given")
    ] = None
    keep_parameters: Annotated[float | None, Field(gt=0, le=1, description="fraction of the parameters to keep")] = None
    keep_channels: Annotated[
        float | None, Field(gt=0, le=1, description="fraction of the removable channels to keep")
    ] = None
    keep_latency: Annotated[
        float | None,
        Field(gt=0, le=1, description="fraction of the latency to keep, at batch size 1 in the target's runtime"),
    ] = None
    importance: Annotated[
        Importance | FunctionPath, Field(description="score of a channel; or a function, package.module:function")
    ] = "magnitude"
    scope: Annotated[
        Scope, Field(description="layer: same fraction of every group; global: least important channels of the network")
    ] = "layer"
    round_to: Annotated[int, Field(ge=1, description="the number of remaining channels is a multiple of this")] = 8
    floor: Annotated[float, Field(ge=0, lt=1, description="fraction of a group that always remains")] = 0.1
    exclude: Annotated[tuple[str, ...], Field(description="patterns of layers whose channels are not removed")] = ()
    branches: Annotated[int, Field(ge=0, description=_BRANCHES)] = 0
    importance_images: Annotated[int, Field(ge=1, description="images for `taylor`, `obs` and `branches`")] = 256
    estimation_images: Annotated[
        int, Field(ge=1, description="images for the least-squares fit and BatchNorm statistics")
    ] = 1024
    seed: Annotated[int, Field(ge=0, lt=2**32, description="seed of `importance: random`")] = 0

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Capture the network and remove channels; every Parameter stays the same object.

        Raises:
            InputError: two targets or one that cannot be met, no data, a masked or quantized network, no removable
                channels, fewer branches than requested, a single image to compare branches on, outputs that are not
                finite, `importance: taylor` for a task without a loss with targets, `keep_latency` without latency
                measurements. The network is then unchanged.
        """
        kind, keep = self._target()
        images = first_batch(context.data, "channel_pruning")
        if kind == "latency" and context.latency is None:
            raise InputError(
                "keep_latency needs latency measurements, and the context has none. Pass AttachContext(..., "
                "latency=tersor.evaluation.latency_ratio.latency_ratio), or write keep_macs."
            )
        graph = capture(model, images)
        if keep == 1 and not self.branches:
            return Attachment(graph)
        refuse_parametrized(graph, "channel_pruning")
        budget = _budget(kind, keep, graph, images[:1], context)
        branches, notes, cuts = list[Branch](), list[str](), list[Cut]()
        remaining, now = graph, budget.before
        if self.branches:
            branches = self._cheapest_branches(budget, graph, context)
            notes = [f"removed branches: {', '.join(map(str, branches))}"]
            remaining = copy_graph(graph)  # so that an error below leaves the network unchanged
            remove(remaining, [branch.cut for branch in branches])
            now = costs(remaining, budget.example)
        if not (branches and kind in ("macs", "parameters") and budget.fraction(now) <= keep):
            cuts, notes = self._channels(budget, remaining, now, context, notes)
        for each in ([branch.cut for branch in branches], cuts):
            if each:
                remove(graph, each)
        return RemovalAttachment(graph, budget.original, cuts, context, self.estimation_images, tuple(notes))

    def _target(self) -> tuple[str, float]:
        keeps = {kind: getattr(self, f"keep_{kind}") for kind in ("macs", "parameters", "channels", "latency")}
        targets: dict[str, float] = {kind: keep for kind, keep in keeps.items() if keep is not None}
        if len(targets) > 1:
            raise InputError(f"channel_pruning takes one target, got keep_{' and keep_'.join(targets)}. Write one.")
        return next(iter(targets.items()), ("macs", 0.5))

    def _cheapest_branches(self, budget: _Budget, graph: fx.GraphModule, context: AttachContext) -> list[Branch]:
        """The branches to remove, in the order of the graph."""
        assert context.data is not None
        branches = find_branches(graph, budget.example)
        if len(branches) < self.branches:
            count, among = len(branches), f": {branches[0]} ... {branches[-1]}" if branches else ""
            raise InputError(
                f"branches: {self.branches} residual branches are requested, but {type(graph).__name__} has "
                f"{count or 'none'} that can be removed{among}. Write branches: {count}{' or fewer' * bool(count)}."
            )
        changes = removal_cost(graph, branches, context.data, self.importance_images, context.progress, context.task)
        shares = cost_shares(graph, branches, budget.example, parameters=budget.kind == "parameters")
        rates = {
            branch: change / max(share, 1e-9) for branch, change, share in zip(branches, changes, shares, strict=True)
        }
        cheapest = set(sorted(branches, key=rates.__getitem__)[: self.branches])
        return [branch for branch in branches if branch in cheapest]

    def _channels(
        self, budget: _Budget, graph: fx.GraphModule, now: Costs, context: AttachContext, notes: Sequence[str]
    ) -> tuple[list[Cut], list[str]]:
        """The channels to remove from `graph`, whose costs are `now`, and all notes."""
        assert context.data is not None
        groups, unprunable = removable_groups(graph, budget.example, self.exclude, "channel_pruning")
        scores = importances(
            self.importance,
            graph,
            groups,
            data=context.data,
            images=self.importance_images,
            seed=self.seed,
            progress=context.progress,
            task=context.task,
        )
        order = self._order(budget.kind, graph, now, groups, unprunable, scores)
        order, blocks, fraction, found = _blocks_for(budget, graph, now, order)
        if fraction > budget.keep:
            raise self._unreachable(budget, fraction, graph, order, unprunable)
        total = sum(len(group.slices) for group in order.groups)
        return order.cuts(blocks), [
            f"{total - sum(map(len, order.removed(blocks)))} of {total} removable channels remain",
            *found,
            *notes,
            *(f"the channels of {root} are not removed, since {reason}" for root, reason in unprunable.items()),
        ]

    def _order(
        self,
        kind: str,
        graph: fx.GraphModule,
        now: Costs,
        groups: list[Group],
        unprunable: dict[str, str],
        scores: Sequence[Tensor | None],
    ) -> RemovalOrder:
        """The order of removal; groups without a score are added to `unprunable`."""
        scored = [(group, each) for group, each in zip(groups, scores, strict=True) if each is not None]
        unprunable |= {
            group.root: f"importance: {self.importance} does not apply to them"
            for group, each in zip(groups, scores, strict=True)
            if each is None
        }
        if not scored:
            other = "random" if self.importance == "magnitude" else "magnitude"
            raise InputError(f"importance: {self.importance} applies to no channel of this network. Write {other}.")
        chosen, of_chosen = zip(*scored, strict=True)
        each_cost = None
        if self.importance in COMPARED_BY_COST and self.scope == "global":
            each_cost = channel_costs("macs" if kind == "latency" else kind, graph, chosen, _macs(now))
        return removal_order(
            chosen, of_chosen, scope=self.scope, round_to=self.round_to, floor=self.floor, channel_costs=each_cost
        )

    def _unreachable(
        self,
        budget: _Budget,
        fraction: float,
        graph: fx.GraphModule,
        order: RemovalOrder,
        unprunable: Mapping[str, str],
    ) -> InputError:
        """The error for a target below the `fraction` that remains without any removable channel of `graph`."""
        keep, before = budget.keep, budget.before
        layers = costs(order.pruned_copy(graph, len(order.blocks)), budget.example).layers
        of = {each.name: each.parameters if budget.kind == "parameters" else each.macs for each in layers}
        what, total = ("parameters", before.parameters) if budget.kind == "parameters" else ("MACs", before.macs)
        shares = {name: cost / total for name, cost in of.items()}
        cuts = [cut for group in order.groups for cut in group.slices[0]]
        reasons = explain_shortfall(graph, shares, cuts, unprunable, self.exclude)
        more = ", or a lower `round_to`" * (self.round_to > 1) + ", or (in a recipe) a lower `floor`" * bool(self.floor)
        return InputError(
            f"keep_{budget.kind}: {keep:g} cannot be met: a fraction of {fraction:.3f} remains after all possible "
            f"removals, {fraction - keep:.3f} more than the target. Remaining fraction of all {what}: {reasons}. Write "
            f"{math.ceil(1000 * fraction) / 1000:.3f} or more{more}."
        )


def _budget(kind: str, keep: float, graph: fx.GraphModule, example: NetworkInput, context: AttachContext) -> _Budget:
    original, latency = copy_graph(graph), context.latency
    with checked_forward(type(graph).__name__, example, captured=True):
        before = costs(graph, example)
    ratio = latency(original, example, context.target) if kind == "latency" and latency is not None else None
    return _Budget(kind, keep, original, before, example, ratio)


def _blocks_for(
    budget: _Budget, graph: fx.GraphModule, now: Costs, order: RemovalOrder
) -> tuple[RemovalOrder, int, float, list[str]]:
    """The order, the blocks to remove from `graph`, whose costs are `now`, the remaining fraction, and notes on it."""
    ratio, kind = budget.latency_ratio, budget.kind
    share = 1.0 if kind == "channels" else budget.fraction(now)

    def estimated(order: RemovalOrder) -> list[float]:
        return [share * each for each in remaining_costs("macs" if ratio else kind, graph, order, _macs(now))]

    def exact(order: RemovalOrder, blocks: int) -> float:
        return budget.fraction(costs(order.pruned_copy(graph, blocks), budget.example))

    notes: list[str] = []
    if ratio is not None:
        macs = estimated(order)
        blocks, fraction = meet_latency(macs, lambda blocks: ratio(order.pruned_copy(graph, blocks)), budget.keep)
        notes.append(
            f"{fraction:.3f} of the measured latency at batch size 1 remains, and {macs[blocks]:.3f} of the MACs"
        )
    else:
        order, blocks, fraction = meet_cost(order, estimated, None if kind == "channels" else exact, budget.keep)
    if kind in ("macs", "latency"):
        notes += budget.before.notes
    return order, blocks, fraction, notes


def _macs(of: Costs) -> dict[str, int]:
    return {layer.name: layer.macs for layer in of.layers}
