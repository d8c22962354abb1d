"""Iterative removal: a candidate within the allowed drop loses further branches or channels, and is trained again.

Removal in several steps, with training after each, keeps more of the metric than removal at once (Han et al., "Learning
both Weights and Connections for Efficient Neural Networks", NeurIPS 2015). The first removal of a candidate is chosen
before anything is trained, so it is often too small: the trained network has lost less than the allowed drop.

How much more is removed is chosen by expected improvement, as the candidates are (`search/promotion.py`). The drop that
a larger removal adds is estimated from the drop of the trained network (`search/removal_curve.py`), and falls with the
training after the removal. If branches are removed, the latency is assumed to be proportional to the MACs. If channels
are removed, it is a power of the MACs: the one between the 8-bit original and the trained network if only channels were
removed from it so far, else the square root. Nothing more is removed from a network for another image size, and from
one without any removal: their latency does not show what a removal costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tersor.recipe import Stage
from tersor.search.candidate import QUANTIZE, Candidate, Removal
from tersor.search.front import Point, distance, violations
from tersor.search.learning_curves import INHERITED
from tersor.search.promotion import LEAST_GAIN, fixed_excess, gain
from tersor.search.removal_curve import ERROR, relative_drop, trained_seconds
from tersor.search.search_context import Search
from tersor.search.study import Record

_LARGEST = 0.25
"""Largest share of the branches, or of the MACs, that is removed at a time; at least one branch."""
_STEP = 0.05
"""Step of the share of the MACs that is removed."""
_USUAL_EXPONENT = 0.5
"""Rough estimate of the power of the share of the MACs that the latency is, if channels are removed."""


@dataclass(frozen=True)
class Further:
    """A candidate with more removed, and the trial of the trained candidate that it starts from."""

    candidate: Candidate
    start: Record


def stages_before(record: Record) -> list[Stage]:
    """The trained stages of a record without those that quantize: a further removal starts from the float network."""
    return [stage for stage in map(Stage.model_validate, record.stages) if stage.name != QUANTIZE]


def further_removals(
    search: Search, trained: Sequence[Record], instead: Record | None, seconds: float, count: int = 1
) -> list[Further]:
    """The candidates that start from the best trained one with more removed; none where that promises no gain.

    Args:
        search: the search.
        trained: the latest trial of each trained candidate.
        instead: the candidate that would be trained further otherwise.
        seconds: time that is left for removal and training.
        count: largest number of candidates.
    """
    best = next((each for each in trained if search.best is not None and each.point.name == search.best.name), None)
    full = next((point for point in search.folder.state.baselines if point.name == Candidate().name), None)
    costs = search.folder.state.costs
    if best is None or full is None or seconds < costs.survey + costs.least or not _can_lose_more(search, best, full):
        return []
    shares = search.bench.branches(best.of, stages_before(best))
    candidates = [replace(best.of, later=(*best.of.later, removal)) for removal in _removals(len(shares))]
    if any(each.name in search.study.failed for each in candidates):
        return []
    known = {name for rung in search.folder.state.rungs for name in rung.members}
    expected = [_expected(search, each, best, full, shares, seconds) for each in candidates if each.name not in known]
    least = (math.inf, 0.0) if instead is None else _order(search, instead, seconds)
    orders = {record.of: _order(search, record, 0.0) for record in expected}
    promising = [of for of, order in orders.items() if order < least and -order[1] > LEAST_GAIN]
    return [Further(each, best) for each in sorted(promising, key=orders.__getitem__)[:count]]


def _can_lose_more(search: Search, record: Record, full: Point) -> bool:
    """Whether a faster network was made from the original by removal, and has not used all of the allowed drop."""
    candidate = record.of
    removed = candidate.inherits and candidate.pixels is None and (candidate.branches > 0 or candidate.keep_macs < 1)
    if not (removed and search.budget.points and record.point.mean_ms < full.mean_ms):
        return False
    return "drop" not in violations(record.point, search.budget, search.reference)


def _removals(branches: int) -> list[Removal]:
    """The possible removals: of branches, or of channels if at most one branch is left."""
    if branches > 1:
        return [Removal(branches=count) for count in range(1, max(1, round(_LARGEST * branches)) + 1)]
    return [Removal(keep_macs=round(1 - _STEP * step, 2)) for step in range(1, round(_LARGEST / _STEP) + 1)]


def _order(search: Search, record: Record, seconds: float) -> tuple[float, float]:
    """A sort key, smaller for a candidate that is expected to be better after another `seconds` of training."""
    return distance(fixed_excess(search, record.point)), -gain(search, record, seconds)


def _expected(
    search: Search, candidate: Candidate, start: Record, full: Point, shares: Sequence[float], seconds: float
) -> Record:
    """What a candidate with more removed than the trained `start` is expected to reach, as if before training.

    Args:
        search: the search.
        candidate: the candidate.
        start: the trial of the trained candidate.
        full: the 8-bit original.
        shares: the shares of the MACs of the branches that are left.
        seconds: time that is left for removal and training.
    """
    costs, removal, before = search.folder.state.costs, candidate.later[-1], trained_seconds(start.point)
    if removal.branches:
        kept = 1 - removal.branches * sum(shares) / len(shares)
    else:
        kept = removal.keep_macs ** _latency_exponent(start, full)
    rounding = max(0.0, start.rounding_loss or 0.0)
    lost = max(search.reference - start.point.validation - rounding, start.point.drop_error / 2)
    added = lost * (relative_drop(kept * start.point.mean_ms, start.point, full) - 1)
    training = seconds - costs.survey - costs.overhead
    drop = lost * (1 + training / before) ** -INHERITED + added * (before / training) ** INHERITED
    changed = {
        "name": candidate.name,
        "latency_ms": {size: ms * kept for size, ms in start.point.latency_ms.items()},
        "validation": search.reference - rounding - drop,
        "drop_error": math.hypot(ERROR * drop, start.point.drop_error),
    }
    point = start.point.model_copy(update=changed)
    return Record(candidate=candidate.parameters, rung=0, point=point)


def _latency_exponent(start: Record, full: Point) -> float:
    """The power of the remaining share of the MACs that the remaining share of the latency is, for channels."""
    removals = (start.of.first, *start.of.later)
    if any(each.branches for each in removals) or start.point.macs >= full.macs:
        return _USUAL_EXPONENT
    return min(1.0, math.log(start.point.mean_ms / full.mean_ms) / math.log(start.point.macs / full.macs))
