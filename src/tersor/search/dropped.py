"""Why candidates have no point on the Pareto front."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tersor.search.candidate import Candidate
from tersor.search.front import Point, covers
from tersor.search.promotion import why_not_continued, why_not_trained
from tersor.search.search_context import Search
from tersor.search.study import Record


def dropped(search: Search, kept: Sequence[Point]) -> dict[str, str]:
    """Why each candidate has no point on the front, by name; for failed ones, the error.

    Args:
        search: a search at its end.
        kept: the front.
    """
    names, failed = {point.name for point in kept}, search.study.failed
    candidates: dict[str, list[Record]] = {}
    for record in search.study.records():
        candidates.setdefault(record.of.name, []).append(record)
    found: dict[str, str] = {}
    for name, records in candidates.items():
        last = max(records, key=lambda record: record.rung)
        if any(record.point.name in names for record in records):
            failed = {each: reason for each, reason in failed.items() if each != name}
            found |= _trained_further(records, names)
        elif not last.point.free:
            reasons = "; ".join(_reasons(search, last, kept))
            trained = f"after {last.point.steps} steps of training" if last.rung else "before training"
            network = "" if last.of.network in name else f"{last.of.network}: "  # as the user wrote it
            measured = f"{network}{last.point.validation:.2f} % {trained}, {last.point.latencies}"
            found[name] = f"{measured}. {reasons[:1].upper()}{reasons[1:]}."
    found |= {name: f"Failed: {reason}" for name, reason in failed.items()}
    return found | {candidate.name: not_tried(candidate) for candidate in search.untried}


def not_tried(candidate: Candidate) -> str:
    """A line about a candidate that the user named and that the search had no time for."""
    return f"{candidate.given}: not tried, because there was no time for it"


def _trained_further(records: Sequence[Record], names: Collection[str]) -> dict[str, str]:
    """The reason for a candidate that is on the front only after training."""
    first = min(records, key=lambda record: record.rung)
    if first.rung or first.point.free or first.point.name in names:
        return {}
    kept = next(record.point for record in records if record.point.name in names)
    after = f"After training, this network is the point {kept.name}."
    return {first.point.name: f"{first.point.validation:.2f} % before training, {first.point.latencies}. {after}"}


def _reasons(search: Search, last: Record, kept: Sequence[Point]) -> list[str]:
    rungs = search.folder.state.rungs
    members = [number for number, rung in enumerate(rungs, 1) if last.of.name in rung.members]
    reasons = [] if members else [why_not_trained(search, last)]
    if members and members[-1] < len(rungs):
        reasons.append(
            f"not trained further after training round {members[-1]} of {len(rungs)}: {why_not_continued(search, last)}"
        )
    better = next((point.name for point in kept if covers(point, last.point)), None)
    if better:
        reasons.append(f"{better} is at least as good in metric, latency and size")
    better = "another point was at least as good in metric, latency and size"
    return reasons or [f"before latencies were measured again at the end, {better}"]
