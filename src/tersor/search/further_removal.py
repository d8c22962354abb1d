"""Iterative removal: a candidate within the allowed drop loses further branches or channels, and is trained again.

Removal in several steps, with training after each, keeps more of the metric than removal at once (Han et al., "Learning
both Weights and Connections for Efficient Neural Networks", NeurIPS 2015). The first removal of a candidate is chosen
before anything is trained, so it is often too small: the trained network has lost less than the allowed drop.

How much more is removed is chosen by expected improvement, as the candidates are (`search/promotion.py`). The drop that
a larger removal adds is estimated from the drop of the trained network (`search/removal_curve.py`), and falls with the
training after the removal. The latency is assumed to be a power of the MACs, as between the 8-bit original and the
trained network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tersor.recipe import Stage
from tersor.search.candidate import QUANTIZE, Candidate, Removal
from tersor.search.front import Point, violations
from tersor.search.learning_curves import INHERITED
from tersor.search.promotion import LEAST_GAIN, gain
from tersor.search.removal_curve import ERROR, relative_drop
from tersor.search.search_context import Search
from tersor.search.study import Record

_LARGEST = 0.25
"""Largest share of the branches, or of the MACs, that is removed at a time."""
_STEP = 0.05
"""Step of the share of the MACs that is removed."""


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
    if best is None or full is None or not _can_lose_more(search, best) or seconds < costs.survey + costs.least:
        return []
    branches = search.bench.branches(best.of, stages_before(best))
    known = {name for rung in search.folder.state.rungs for name in rung.members} | search.study.failed.keys()
    least = LEAST_GAIN if instead is None else max(LEAST_GAIN, gain(search, instead, seconds))
    promising = {
        candidate: gained
        for removal in _removals(branches)
        if (candidate := replace(best.of, later=(*best.of.later, removal))).name not in known
        and (gained := _gain(search, candidate, best, full, branches, seconds)) > least
    }
    return [Further(each, best) for each in sorted(promising, key=promising.__getitem__, reverse=True)[:count]]


def _can_lose_more(search: Search, record: Record) -> bool:
    """Whether a candidate was made from the original, and has not used all of the allowed drop."""
    limited = record.of.inherits and search.budget.points is not None
    return limited and "drop" not in violations(record.point, search.budget, search.reference)


def _removals(branches: int) -> list[Removal]:
    """The possible removals: of branches, or of channels if at most one branch is left."""
    if branches > 1:
        return [Removal(branches=count) for count in range(1, max(1, round(_LARGEST * branches)) + 1)]
    return [Removal(keep_macs=round(1 - _STEP * step, 2)) for step in range(1, round(_LARGEST / _STEP) + 1)]


def _gain(search: Search, candidate: Candidate, start: Record, full: Point, branches: int, seconds: float) -> float:
    """The expected improvement by a candidate with more removed than the trained `start`."""
    costs, removal = search.folder.state.costs, candidate.later[-1]
    kept = 1 - removal.branches / branches if removal.branches else removal.keep_macs
    faster = kept ** _latency_exponent(start.point, full)
    latency = {size: ms * faster for size, ms in start.point.latency_ms.items()}
    if faster == 1:
        return 0.0
    rounding = max(0.0, start.rounding_loss or 0.0)
    before = max(search.reference - start.point.validation - rounding, start.point.drop_error / 2)
    added = before * (relative_drop(faster * start.point.mean_ms, start.point, full) - 1)
    training = seconds - costs.survey - costs.overhead
    in_total = 1 + training / start.point.seconds
    drop = before * in_total**-INHERITED + added * (start.point.seconds / training) ** INHERITED
    changed = {
        "name": candidate.name,
        "latency_ms": latency,
        "validation": search.reference - rounding - drop,
        "drop_error": math.hypot(ERROR * drop, start.point.drop_error),
    }
    point = start.point.model_copy(update=changed)
    return gain(search, Record(candidate=candidate.parameters, rung=0, point=point), 0.0)


def _latency_exponent(start: Point, full: Point) -> float:
    """The power of the share of the MACs that the share of the latency is; 0 if `start` is not faster."""
    if start.mean_ms >= full.mean_ms or start.macs >= full.macs:
        return 0.0
    return min(1.0, math.log(start.mean_ms / full.mean_ms) / math.log(start.macs / full.macs))
