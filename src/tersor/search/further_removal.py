"""Iterative removal: a candidate within the allowed drop loses further branches or channels, and is trained again.

Removal in several steps, with training after each, keeps more of the metric than removal at once (Han et al., "Learning
both Weights and Connections for Efficient Neural Networks", NeurIPS 2015). The first removal of a candidate is chosen
before anything is trained, so it is often too small: the trained network has lost less than the allowed drop. How much
more is removed depends on what is left of the allowed drop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tersor.recipe import Stage
from tersor.search.candidate import QUANTIZE, Candidate, Removal
from tersor.search.promotion import gain
from tersor.search.search_context import Search
from tersor.search.study import Record

_LARGEST = 0.25
"""Share of the branches, or of the MACs, that is removed from a candidate that has lost nothing."""
_LEAST_LEFT = 0.1
"""Least share of the allowed drop that a candidate has not used."""
_STEP = 0.05
"""Step of the share of the MACs that is removed."""
_SUCCESS = 0.5
"""Assumed probability that a candidate ends within the allowed drop after such a removal."""
_LEAST_TRAINING = 0.15
"""Least time of the training that follows, relative to all training before."""


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
        seconds: time for the training after the removal.
        count: number of candidates; each has more removed than the one before.
    """
    best = next((each for each in trained if search.best is not None and each.point.name == search.best.name), None)
    if best is None or not best.of.inherits or seconds < _least_seconds(search, best):
        return []
    left = _left(search, best)
    if left < _LEAST_LEFT:
        return []
    branches = search.bench.branches(best.of, stages_before(best))
    removals = dict.fromkeys(
        _removal(branches, _LARGEST * left * 2 * (place + 1) / (count + 1)) for place in range(count)
    )
    gained = -math.log(1 - _share(next(iter(removals)), branches))
    if instead is not None and gain(search, instead, seconds) >= _SUCCESS * gained:
        return []
    known = {name for rung in search.folder.state.rungs for name in rung.members} | search.study.failed.keys()
    candidates = [replace(best.of, later=(*best.of.later, removal)) for removal in removals]
    return [Further(candidate, best) for candidate in candidates if candidate.name not in known]


def _least_seconds(search: Search, record: Record) -> float:
    """Seconds below which nothing is removed: for the removal itself and enough training after it."""
    costs = search.folder.state.costs
    return max(costs.survey + costs.least, _LEAST_TRAINING * record.point.seconds)


def _left(search: Search, record: Record) -> float:
    """The share of the allowed drop that a candidate has not used, less one standard error of its drop."""
    if not search.budget.points:
        return 0.0
    lost = max(0.0, search.reference - record.point.validation)
    return 1 - (lost + record.point.drop_error) / search.budget.points


def _removal(branches: int, share: float) -> Removal:
    if branches > 1:
        return Removal(branches=min(branches - 1, max(1, round(share * branches))))
    return Removal(keep_macs=round(1 - _STEP * max(1, round(share / _STEP)), 2))


def _share(removal: Removal, branches: int) -> float:
    return removal.branches / branches if removal.branches else 1 - removal.keep_macs
