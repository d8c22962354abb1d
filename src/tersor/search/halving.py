"""Successive halving: train promising candidates for a while, train the better ones further, and repeat.

Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", AISTATS 2016. The
resource is time, not steps, since a step of a fast network costs less: each candidate of a rung gets the same number of
seconds. Each rung is a training stage of its own, from the weights of the rung before. The last rungs have one
candidate and most of the time. The candidate of the very last rung is chosen from all candidates again: if the best one
is already within the budget, the rest of the time can be used for a faster one. If none of the trained candidates
promises that, more is removed from the best one (`further_removal`). The last rung is divided if its candidate still
exceeds the allowed drop. From the third rung on, a candidate with less removed can be chosen, too (`smaller_removal`).

A candidate that is not expected to end within the allowed drop, even after all of the time left, is not trained again,
unless nothing else can use the time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from tersor.search.candidate import Candidate
from tersor.search.front import violations
from tersor.search.further_removal import further_removals
from tersor.search.plan import LEAST_FIRST, RUNG_SIZES, RUNGS
from tersor.search.promotion import entrants, hopeful, promoted
from tersor.search.rung_training import rounds_badly, seconds_to_train, train_candidates
from tersor.search.search_context import Search
from tersor.search.smaller_removal import smaller_removals
from tersor.search.state import Rung
from tersor.search.study import Record
from tersor.search.workers import Workers

_LEAST_SHARE = 0.03
_FURTHER_SHARE = 0.5
"""Share of the training time that is left, for the training after a further removal; there can be several."""
_EXCEEDING_SHARE = 0.6
"""Share of the training time that is left, for one that exceeds the allowed drop; the rest is for another try."""
_LEAST_OVERHEADS = 10
"""A training run is divided if its second part has at least so many times the seconds of attaching and exporting."""


def halve(search: Search, workers: Workers | None = None, *, last_resort: bool = True) -> None:
    """Train candidates in rungs until the time is used up.

    If a finished search gets more time, its last candidate is trained further.

    Args:
        search: the search.
        workers: processes that train several candidates at a time; by default, this process trains them one by one.
        last_resort: what to do if all candidates are expected to exceed the allowed drop. True: train them further.
            False: leave the time for surveying more candidates.
    """
    state = search.folder.state
    by_name = {record.of.name: record.of for record in search.study.records()}
    for number in itertools.count(1):
        if len(state.rungs) < number:
            if state.rungs and not _time_for_another(search):
                return
            made = _rung(search, number, workers.count if workers else 1, last_resort=last_resort)
            if not made.members:
                return
            state.rungs.append(made)
            search.save()
        rung = state.rungs[number - 1]
        by_name |= {name: Candidate.of(parameters) for name, parameters in rung.unsurveyed.items()}
        waiting = [
            by_name[name]
            for name, training in rung.members.items()
            if search.study.find(by_name[name], training) is None and name not in search.study.failed
        ]
        train_candidates(search, rung, waiting, workers)


def why_not_trained(search: Search) -> str:
    """Why `halve` trains no further candidate, in words."""
    if seconds_to_train(search) < (least := _least_seconds(search)):
        return f"training a candidate takes at least {least / 60:.1f} minutes"
    return "no promising candidate can be improved by training"


def _time_for_another(search: Search) -> bool:
    """Whether the time left is enough for another training run: a planned one, or one after the last rung."""
    state = search.folder.state
    least = _least_seconds(search) if state.rungs[-1].until is None else state.costs.overhead
    return seconds_to_train(search) > least


def _least_seconds(search: Search) -> float:
    """Seconds below which no candidate is trained: for the first time, or further."""
    costs = search.folder.state.costs
    if not search.folder.state.rungs:
        return costs.least
    return max(_LEAST_SHARE * search.clock.total, 3 * costs.overhead)


def _rung(search: Search, number: int, at_once: int, *, last_resort: bool = True) -> Rung:
    """The candidates of a rung, and its end; `at_once` of them are trained at the same time."""
    state, available = search.folder.state, seconds_to_train(search)
    share = RUNGS[number - 1] if number <= len(RUNGS) else _EXCEEDING_SHARE
    short = number >= len(RUNGS) and (1 - share) * available < _LEAST_OVERHEADS * state.costs.overhead
    last = short or state.extended
    fresh: list[Record] = []
    if number == 1:
        seconds = max(share, LEAST_FIRST) * available
        count = state.costs.entrants(seconds, at_once) or min(1, state.costs.entrants(available))
        chosen = entrants(search, count)
        share = max(share, min(LEAST_FIRST, state.costs.least * len(chosen) / at_once / max(available, 1e-9)))
    else:
        largest = RUNG_SIZES[min(number, len(RUNG_SIZES)) - 1] * at_once
        count = max(1, min(largest, state.costs.entrants(share * available, at_once)))
        left = available * (math.prod(1 - each for each in RUNGS[number - 1 : -1]) if count > at_once else 1.0)
        trained = _trained(search)
        late, long = last or number > len(RUNGS), last or number >= len(RUNGS)
        possible = [*trained, *(smaller_removals(search, trained, available) if long else [])]
        kept = hopeful(search, possible, available)
        chosen = promoted(search, kept, count, left, last=late)
        removing = _with_more_removed(search, trained, chosen, count, available) if count <= at_once else None
        if removing is not None:
            return removing
        if not chosen:
            chosen = fresh = _never_trained(search, 1 if state.extended else count)
            share = max(share, LEAST_FIRST) if fresh else share
            if not fresh and last_resort and len(kept) < len(possible):
                chosen = promoted(search, trained, count, left, last=late)
    divided = number == len(RUNGS) or (number > len(RUNGS) and any(_may_fail(search, each) for each in chosen))
    last = last or (len(chosen) <= at_once and not divided and not fresh)
    members = {record.of.name: record.rung + 1 for record in chosen}
    new = [record.of for record in chosen if not record.rung and search.study.find(record.of) is None]
    until = None if last else search.clock.used + share * available
    return Rung(members=members, until=until, unsurveyed={each.name: each.parameters for each in new})


def _may_fail(search: Search, record: Record) -> bool:
    """Whether a candidate has not been shown to be within the allowed drop, if there is a limit.

    One that loses much by quantization needs quantization-aware training, which only the last rung has.
    """
    if search.budget.points is None or rounds_badly(record):
        return False
    return not record.rung or "drop" in violations(record.point, search.budget, search.reference)


def _with_more_removed(
    search: Search, trained: Sequence[Record], chosen: Sequence[Record], count: int, available: float
) -> Rung | None:
    """A rung of `count` candidates that removes more from the best one; None if one of the `chosen` promises more.

    If fewer removals are promising, trained candidates among the `chosen` ones are trained further.
    """
    state, share = search.folder.state, _FURTHER_SHARE
    few = (1 - share) * available < _LEAST_OVERHEADS * state.costs.overhead
    if few or share * available < state.costs.survey + state.costs.least or state.extended:
        share = 1.0
    further = further_removals(search, trained, chosen[0] if chosen else None, available, count)
    if not further:
        return None
    others = [each for each in chosen if each.rung][: count - len(further)]
    members = {each.candidate.name: each.start.rung + 1 for each in further}
    return Rung(
        members=members | {each.of.name: each.rung + 1 for each in others},
        until=None if share == 1 else search.clock.used + share * available,
        unsurveyed={each.candidate.name: each.candidate.parameters for each in further},
    )


def _never_trained(search: Search, count: int) -> list[Record]:
    """The surveyed candidates that are trained if no trained one can be improved enough."""
    trained = {record.of.name for record in search.study.records() if record.rung}
    chosen = entrants(search, count, without=trained)
    return [record for record in chosen if record.of != Candidate()]


def _trained(search: Search) -> list[Record]:
    """The latest training of each candidate; of an extended search only the last one, which has its checkpoints."""
    rungs = search.folder.state.rungs
    names = rungs[-1].members if search.folder.state.extended else {name for rung in rungs for name in rung.members}
    records = [record for record in search.study.records() if record.rung and record.of.name in names]
    latest = {record.of.name: record for record in sorted(records, key=lambda record: record.rung)}
    return [record for name, record in latest.items() if name not in search.study.failed]
