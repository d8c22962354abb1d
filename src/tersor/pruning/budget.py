"""How many blocks of channels are removed to meet a cost or latency, and what keeps a network from meeting it."""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from torch import fx

from tersor.graph.layer_selection import Layer, matching
from tersor.pruning.channel_groups import Cut
from tersor.pruning.channel_selection import RemovalOrder

_ROUNDING = 0.005
"""Larger differences between the estimated and the exact fraction are not rounding."""

_FAR = 0.02
"""A cost that is lower than the target by more than this fraction calls for another order of the blocks."""

_PROBES = 7
_CLOSE = 0.02
"""Smaller differences of a latency, as a fraction, are noise."""

_REASONS = 4
_LAYERS = 3


def meet_cost(
    order: RemovalOrder,
    estimated: Callable[[RemovalOrder], Sequence[float]],
    exact: Callable[[RemovalOrder, int], float] | None,
    keep: float,
) -> tuple[RemovalOrder, int, float]:
    """Find the fewest blocks whose removal meets `keep` (or all), and return their order, number and remaining cost.

    If the last block takes the cost far below `keep`, it is moved to the end of the order, as long as this brings the
    cost closer to `keep`.

    Args:
        order: the order of removal.
        estimated: remaining fraction without the first 0, 1, 2 ... blocks, from the widths of layers. Attention and
            other operators between layers are not in it.
        exact: the remaining fraction after the removal of this number of blocks, counted on the pruned network; used
            where the estimate is off. None: the estimate is exact.
        keep: the target fraction.
    """
    blocks, fraction = _fewest(order, estimated, exact, keep)
    while blocks and keep - fraction > _FAR:
        other = order.postponed(blocks - 1)
        found, closer = _fewest(other, estimated, exact, keep)
        if not fraction < closer <= keep:
            break
        order, blocks, fraction = other, found, closer
    return order, blocks, fraction


def _fewest(
    order: RemovalOrder,
    estimated: Callable[[RemovalOrder], Sequence[float]],
    exact: Callable[[RemovalOrder, int], float] | None,
    keep: float,
) -> tuple[int, float]:
    estimates = estimated(order)
    numbers = range(len(estimates))
    counted = functools.cache(lambda number: estimates[number] if exact is None else exact(order, number))
    blocks = min(bisect_left(numbers, x=True, key=lambda number: estimates[number] <= keep), numbers[-1])
    if counted(blocks) > keep or abs(counted(blocks) - estimates[blocks]) > _ROUNDING:
        blocks = min(bisect_left(numbers, x=True, key=lambda number: counted(number) <= keep), numbers[-1])
    return blocks, counted(blocks)


def meet_latency(macs: Sequence[float], ratio: Callable[[int], float], keep: float) -> tuple[int, float]:
    """Find nearly the fewest blocks whose removal meets the latency `keep` (or all), and the measured fraction.

    Bisects over the remaining MACs, because latency is a smoother function of the MACs than of the number of blocks.

    Args:
        macs: remaining fraction of the MACs without the first 0, 1, 2 ... blocks.
        ratio: measures the latency after the removal of this number of blocks, as a fraction of the original one.
        keep: the target fraction.
    """
    slow, fast, measured_fast = 0, len(macs) - 1, 0.0
    for _ in range(_PROBES):
        middle = (macs[slow] + macs[fast]) / 2
        blocks = min(bisect_left(range(len(macs)), -middle, key=lambda number: -macs[number]), fast - 1)
        if blocks <= slow:
            break
        measured = ratio(blocks)
        if measured > keep:
            slow = blocks
            continue
        fast, measured_fast = blocks, measured
        if measured > keep - _CLOSE:
            break
    return fast, measured_fast or ratio(fast)


def explain_shortfall(
    graph: fx.GraphModule,
    shares: Mapping[str, float],
    cuts: Sequence[Cut],
    unprunable: Mapping[str, str],
    exclude: Sequence[str],
) -> str:
    """The largest remaining costs and their reasons: `0.763 in rnn (no part of it is removed), 0.016 in ...`.

    Args:
        graph: the unpruned network.
        shares: layer -> its cost after removal of everything removable, as a fraction of the original network's cost.
        cuts: the cut of one channel of every removable group.
        unprunable: root of a group that is not removed -> the reason.
        exclude: patterns of layers whose channels are not removed.
    """
    layers: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(shares, key=lambda name: -shares[name]):
        if shares[name] > 0:
            layers[_reason(graph, name, cuts, unprunable, exclude)].append(name)
    totals = {reason: sum(shares[name] for name in names) for reason, names in layers.items()}
    largest = sorted(totals, key=lambda reason: -totals[reason])[:_REASONS]
    return ", ".join(f"{totals[reason]:.3f} in {_listed(layers[reason])} ({reason})" for reason in largest)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(name or "products outside of layers" for name in names[:_LAYERS])
    return shown if len(names) <= _LAYERS else f"{shown}, ... ({len(names)} in all)"


def _reason(
    graph: fx.GraphModule, name: str, cuts: Sequence[Cut], unprunable: Mapping[str, str], exclude: Sequence[str]
) -> str:
    module = graph.get_submodule(name)
    roots = [root for root in unprunable if name and (root == name or root.startswith(f"{name}."))]
    if roots:
        return f"output channels not removed: {unprunable[roots[0]]}"
    if exclude and name in matching(exclude, [each for each, _ in graph.named_modules() if each]):
        return "excluded"
    if any(cut.layer == name or cut.layer.startswith(f"{name}.") for cut in cuts):
        return "as narrow as `floor` and `round_to` allow"
    return "none of its channels can be removed" if isinstance(module, Layer) else "no part of it is removed"
