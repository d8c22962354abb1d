"""Which candidates are trained, and which of them are trained further.

Without a limit on the drop, the candidates with the best expected metric are promoted. With one, it is the expected
improvement (Jones et al., "Efficient Global Optimization of Expensive Black-Box Functions", 1998): the probability that
the candidate ends within the allowed drop, times the logarithm of its speedup over the fastest point within the budget
so far. The probability is raised to a power above 1, because a candidate that exceeds the drop gains nothing: of two
candidates with the same expected improvement, the safer one is trained.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from tersor.core.errors import counted
from tersor.search.candidate import Candidate
from tersor.search.front import CEILING, Point, distance, front, rank, violations
from tersor.search.learning_curves import error_of_expected, expected
from tersor.search.search_context import Search
from tersor.search.study import Record

_MUCH_FASTER, _FASTER = 0.85, 0.97
"""A candidate is worth training below these shares of the latency of the fastest free baseline; the first if any is."""
_STUDENTS = 3
"""One in so many of the first candidates is a student, if there are enough changes of the original."""
_PROMISING = 0.4
"""A change of the original is worth training from this share of the original's metric on, if there are such."""
_CAUTION = {False: 1.5, True: 2.0}
"""Exponent of the probability in the expected improvement, before the last training run and for it."""
LEAST_GAIN = 0.01
_RECOVERED = "its metric has not dropped, so there is nothing for training to recover"
_HOPELESS = 0.05
"""A candidate is trained further if it ends within the allowed drop with at least this probability, or if no other
candidate can be."""


def entrants(search: Search, count: int, without: Collection[str] = ()) -> list[Record]:
    """Surveyed candidates to train: the Pareto front and the students, evenly spread over the latencies.

    Candidates that failed are left out.

    Args:
        search: the search.
        count: the largest number of candidates.
        without: names of candidates to leave out.
    """
    left_out = {*without, *search.study.failed}
    surveyed = [record for record in search.study.records() if not record.rung and record.of.name not in left_out]
    records = [record for record in surveyed if improvable(search, record)]
    free = min(point.mean_ms for point in search.points if point.free)
    smaller = search.budget.megabytes is not None
    for share in (_MUCH_FASTER, _FASTER):
        faster = [
            record for record in records if record.point.mean_ms < share * free or (smaller and record.of.bits != "8")
        ]
        if len(faster) >= count:
            break
    fitting = [record for record in faster if not fixed_excess(search, record.point)] or faster
    inherited = _promising(search, [record for record in fitting if record.of.inherits])
    students = [record for record in fitting if not record.of.inherits]
    least = -(-count // _STUDENTS) if count > 1 else 0
    chosen = _spread(students, min(len(students), max(least, count - len(inherited))))
    chosen += _spread(inherited, count - len(chosen))
    if not chosen and count:  # nothing is much faster: the best network so far, else the 8-bit original
        best = "" if search.best is None else search.best.name
        chosen = [record for record in records if record.point.name == best]
        chosen = chosen or [record for record in records if record.of == Candidate()]
    return chosen


def improvable(search: Search, record: Record) -> bool:
    """Whether training can improve a candidate: with a limit on the drop, it must have lost something."""
    return record.point.validation < (CEILING if search.budget.points is None else search.reference)


def why_not_trained(search: Search, record: Record) -> str:
    """Why a surveyed candidate was not trained, in words."""
    free = min(point.mean_ms for point in search.points if point.free)
    if not improvable(search, record):
        return f"not trained: {_RECOVERED}"
    if fixed_excess(search, record.point):
        return "not trained: it exceeds a latency or size limit, which training does not change"
    smaller = search.budget.megabytes is not None and record.of.bits != "8"
    if record.point.mean_ms >= _FASTER * free and not smaller:
        return "not trained: it is slower, or hardly faster, than the fastest free baseline"
    if not search.folder.state.rungs:
        return "not trained: there was no time for it"
    rungs = search.folder.state.rungs
    unsurveyed = {name for rung in rungs for name in rung.unsurveyed}
    trained = {name for rung in rungs for name in rung.members} - unsurveyed
    return (
        f"not trained: training was limited to {counted(len(trained), 'candidate')}, chosen by latency, size and the "
        "metric before training"
    )


def why_not_continued(search: Search, record: Record) -> str:
    """Why a trained candidate was not trained further, in words."""
    if not improvable(search, record):
        return _RECOVERED
    unlikely = ", or it was not expected to end within the allowed drop" * (search.budget.points is not None)
    return f"others were expected to gain more{unlikely}"


def _promising(search: Search, inherited: Sequence[Record]) -> list[Record]:
    """Changes of the original that no other change dominates, without those that have lost most of the metric."""
    kept = {point.name for point in front(record.point for record in inherited)}
    best = [record for record in inherited if record.point.name in kept]
    return [record for record in best if record.point.validation >= _PROMISING * search.reference] or best


def fixed_excess(search: Search, point: Point) -> dict[str, float]:
    """The limits on latency and size that a point exceeds, which training does not change."""
    lacking = violations(point, search.budget, search.reference)
    return {name: value for name, value in lacking.items() if name != "drop"}


def _spread(records: Sequence[Record], count: int) -> list[Record]:
    """`count` records, evenly spaced in the order of their latency."""
    ordered = sorted(records, key=lambda record: record.point.mean_ms)
    if count >= len(ordered):
        return ordered
    return [ordered[int((place + 0.5) * len(ordered) / count)] for place in range(count)]


def promoted(
    search: Search, trained: Sequence[Record], count: int, seconds: float, *, last: bool = False
) -> list[Record]:
    """The candidates of the next rung. If there are several, the best student and the best change of the original stay.

    Those that training cannot improve are left out.

    Args:
        search: the search.
        trained: the candidates so far.
        count: number of candidates of the next rung.
        seconds: time for which the best one is expected to be trained further.
        last: whether it is the last training run.
    """
    trained = [record for record in trained if improvable(search, record)]
    ordered = sorted(trained, key=lambda record: _key(search, record, record.point.seconds + seconds, last=last))
    if count > 1:
        firsts = [next((each for each in ordered if each.of.inherits is kind), None) for kind in (True, False)]
        kept = [each for each in ordered if each in firsts]
        ordered = kept + [each for each in ordered if each not in kept]
    return ordered[:count]


def _key(search: Search, record: Record, seconds: float, *, last: bool) -> tuple[float, ...]:
    """A sort key, smaller for candidates that are expected to be better after `seconds` of training in total."""
    metric = expected(search, record, seconds)
    order = rank(record.point.model_copy(update={"validation": metric}), search.budget, search.reference)
    if search.budget.points is None:
        return order
    gained = improvement(search, record, seconds, power=_CAUTION[last])
    return distance(fixed_excess(search, record.point)), -gained if gained > LEAST_GAIN else 0.0, *order


def hopeful(search: Search, trained: Sequence[Record], seconds: float) -> list[Record]:
    """The trained candidates that may end within the allowed drop after another `seconds` of training."""
    if search.budget.points is None:
        return list(trained)
    return [record for record in trained if _probability(search, record, record.point.seconds + seconds) >= _HOPELESS]


def gain(search: Search, record: Record, seconds: float) -> float:
    """The expected improvement by another `seconds` of training, as in the choice of the last training run."""
    return improvement(search, record, record.point.seconds + seconds, power=_CAUTION[True])


def improvement(search: Search, record: Record, seconds: float, power: float = 1.0) -> float:
    """P^power * gain: P is the probability that the candidate is within the allowed drop after `seconds` in total."""
    within = [point for point in search.points if not violations(point, search.budget, search.reference)]
    before = min((point.mean_ms for point in within), default=max(point.mean_ms for point in search.points))
    gained = math.log(before / record.point.mean_ms)
    return max(0.0, gained) * _probability(search, record, seconds) ** power


def _probability(search: Search, record: Record, seconds: float) -> float:
    """The probability that a candidate ends within the allowed drop after `seconds` of training in total."""
    assert search.budget.points is not None
    error = error_of_expected(search, record, seconds, search.budget.points)
    margin = expected(search, record, seconds) - (search.reference - search.budget.points)
    return (1 + math.erf(margin / (math.sqrt(2) * max(error, 1e-9)))) / 2
