"""Candidates with less removed, for a search whose trained candidate exceeds the allowed drop.

Their metric after training is estimated from this candidate (`search/removal_curve.py`). The logarithm of the latency
is assumed to be linear in the share of the removal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tersor.search.candidate import Candidate
from tersor.search.front import Point, violations
from tersor.search.learning_curves import INHERITED
from tersor.search.removal_curve import ERROR, relative_drop, trained_seconds
from tersor.search.search_context import Search
from tersor.search.study import Record

_SHARES = tuple(step / 10 for step in range(1, 10))
"""Shares of a removal that are considered."""
_STEP = 0.05
"""Step of the share of the MACs that is removed."""


def smaller_removals(search: Search, trained: Sequence[Record], seconds: float) -> list[Record]:
    """Untrained candidates with a share of the removal of the trained one, and what they are expected to reach.

    Args:
        search: the search.
        trained: the latest trial of each trained candidate. Of those that exceed the allowed drop and were trained for
            at least half as long as the longest trained one, the one with the smallest drop is used.
        seconds: time for training one of the candidates, above 0.

    Returns:
        Records as if before training, with the estimated metric and latency after it. None without a limit on the drop.
    """
    full = next((point for point in search.folder.state.baselines if point.name == Candidate().name), None)
    if search.budget.points is None or full is None:
        return []
    exceeding = [
        each
        for each in trained
        if _removes(each.of) and "drop" in violations(each.point, search.budget, search.reference)
    ]
    if not exceeding:
        return []
    longest = max(each.point.seconds for each in exceeding)
    start = max(
        (each for each in exceeding if each.point.seconds >= longest / 2), key=lambda each: each.point.validation
    )
    known = {record.of.name for record in search.study.records() if record.rung} | search.study.failed.keys()
    smaller = dict.fromkeys(_with_share(start.of, share) for share in _SHARES)
    return [
        Record(candidate=each.parameters, rung=0, point=_expected(search, each, start, full, seconds))
        for each in smaller
        if _removes(each) and each.name not in known
    ]


def _removes(candidate: Candidate) -> bool:
    """Whether something is removed from the original, all of it before training."""
    return candidate.inherits and not candidate.later and (candidate.branches > 0 or candidate.keep_macs < 1)


def _with_share(candidate: Candidate, share: float) -> Candidate:
    """A candidate with a share of its removal."""
    keep_macs = round(1 - _STEP * round(share * (1 - candidate.keep_macs) / _STEP), 2)
    return replace(candidate, branches=round(share * candidate.branches), keep_macs=keep_macs)


def _expected(search: Search, candidate: Candidate, start: Record, full: Point, seconds: float) -> Point:
    """The point that a candidate is expected to have after training, from the point of one with more removed.

    Args:
        search: the search.
        candidate: the candidate.
        start: the latest trial of the one with more removed.
        full: the 8-bit original.
        seconds: training time.
    """
    surveyed, share = search.study.find(candidate), _share(candidate, start.of)
    expected = surveyed.point if surveyed else _between(candidate, full, start.point, share)
    faster = start.point.mean_ms < full.mean_ms
    smaller = relative_drop(expected.mean_ms, start.point, full) if faster else share
    by_time = (trained_seconds(start.point) / seconds) ** INHERITED
    rounding = max(0.0, start.rounding_loss or 0.0)
    by_removal = max(0.0, search.reference - start.point.validation - rounding) * smaller * by_time
    error = math.hypot(ERROR * by_removal, start.point.drop_error * smaller * max(1.0, by_time))
    validation = max(0.0, search.reference - rounding - by_removal)
    return expected.model_copy(update={"validation": validation, "drop_error": error})


def _between(candidate: Candidate, full: Point, start: Point, share: float) -> Point:
    """The point of a candidate before training, between two others: `start` has more removed, `full` nothing."""

    def interpolated(first: float, last: float) -> float:
        return first ** (1 - share) * last**share

    latency = {size: interpolated(ms, start.latency_ms[size]) for size, ms in full.latency_ms.items()}
    changed = {"name": candidate.name, "description": str(candidate), "steps": 0, "seconds": 0.0, "latency_ms": latency}
    changed |= {
        "bytes": round(interpolated(full.bytes, start.bytes)),
        "macs": round(interpolated(full.macs, start.macs)),
    }
    return start.model_copy(update=changed)


def _share(smaller: Candidate, larger: Candidate) -> float:
    """The share of the removal of one candidate in that of another."""
    if larger.branches:
        return smaller.branches / larger.branches
    return (1 - smaller.keep_macs) / (1 - larger.keep_macs)
