"""What a search does with the time that no training can use, and why it ends early."""

from __future__ import annotations

from collections.abc import Callable

from tersor.search.candidate import Candidate
from tersor.search.dropped import not_tried
from tersor.search.halving import why_not_trained
from tersor.search.plan import survey_seconds
from tersor.search.rung_training import seconds_to_train
from tersor.search.search_context import Search
from tersor.search.space import Space
from tersor.search.survey import survey

_UNUSED = 0.1
"""A search that leaves more than this share of its time unused says why."""

_FOR_THE_FIRST = 0.5
"""Share of the time reserved for the end that the first candidate of the survey may take."""


def train_and_survey(search: Search, space: Space, train: Callable[[bool], None]) -> None:
    """Train; while there is time that no training can use, survey more candidates and train again.

    Candidates that are not expected to end within the allowed drop are trained further only after the survey has
    continued.

    A search that ends early prints the reason. Candidates that the user named and that were not tried are printed.

    Args:
        search: a search after its survey.
        space: the candidates.
        train: trains candidates. Its argument is `last_resort` of `halve`.
    """
    train(False)
    more = True
    while more:
        more = _survey_more(search, space)
        train(True)
    unused = search.clock.left if search.best is not None and search.best.free else seconds_to_train(search)
    if unused > _UNUSED * search.clock.total:
        left, total = search.clock.left / 60, search.clock.total / 60
        reserve = min(left, search.reserve(more=1) / 60)
        search.bar.tell(
            f"training ends: {why_not_trained(search)}. {left:.1f} of {total:.3g} minutes are left, {reserve:.1f} of "
            "them reserved for the final measurements."
        )
    for candidate in search.untried:
        search.bar.tell(not_tried(candidate))


def _survey_more(search: Search, space: Space) -> bool:
    """Survey for a share of the time left, but at least one candidate; returns whether there was another one.

    The first candidate of a search may take a share of the time reserved for the end.
    """
    state, left = search.folder.state, seconds_to_train(search)
    first = all(record.of == Candidate() for record in search.study.records())
    if left + first * _FOR_THE_FIRST * search.reserve(more=1) < state.costs.survey:
        return False
    before = len(search.study.records()) + len(search.study.failed)
    state.survey_until = search.clock.used + max(state.costs.survey, survey_seconds(left))
    survey(search, space)
    return len(search.study.records()) + len(search.study.failed) > before
