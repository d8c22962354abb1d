"""The expected metric after more training: the drop falls as a power of the training time.

Hestness et al., "Deep Learning Scaling is Predictable, Empirically", 2017, find power laws of the error. Here, the
power law describes the distance to the original. A ResNet-56 without 9 of its branches lost 4.8 points after 11 s of
training and 1.2 after 148 s (exponent 0.52); with half of its MACs, 0.93 after 600 steps, 0.5 after 1,310 and 0.23
after 7,020 (0.8 and then 0.46). So the curves get flatter. The expected exponent is three quarters of the exponent
between the last two training runs of a candidate. It is averaged with a typical exponent; both are weighted by their
precision.
"""

from __future__ import annotations

import math

from tersor.search.search_context import Search
from tersor.search.study import Record

FRESH, INHERITED = 0.6, 0.5
"""Rough estimates for students with random weights, and for networks that start from trained weights."""
_USUAL_ERROR = 0.15
"""One standard error of a usual exponent."""
_SLOWEST, _FASTEST = 0.05, 1.0
_FLATTER = 0.75
_LEAST_DROP = 0.05


def expected(search: Search, record: Record, seconds: float) -> float:
    """The metric of a trained candidate that is expected after `seconds` of training in total."""
    drop = search.reference - record.point.validation
    if drop <= 0 or record.point.seconds <= 0:
        return record.point.validation
    return search.reference - drop * max(1.0, seconds / record.point.seconds) ** -exponent(search, record)[0]


def error_of_expected(search: Search, record: Record, seconds: float, allowed: float | None = None) -> float:
    """One standard error of `expected`, in points: of the measured drop, and of the exponent.

    The exponent's error is an error of the logarithm of the drop. In points it is larger for larger drops, so
    its mean from the expected drop to the `allowed` one is used.

    Args:
        search: the search.
        record: a trial of a trained candidate.
        seconds: training time in total.
        allowed: the allowed drop; by default, the error is that at the expected drop.
    """
    drop = search.reference - expected(search, record, seconds)
    if drop <= 0 or record.point.seconds <= 0:
        return record.point.drop_error
    of_logarithm = exponent(search, record)[1] * math.log(max(1.0, seconds / record.point.seconds))
    return math.hypot(
        record.point.drop_error, of_logarithm * _logarithmic_mean(drop, drop if allowed is None else allowed)
    )


def _logarithmic_mean(first: float, second: float) -> float:
    if first <= 0 or second <= 0:
        return 0.0
    return first if math.isclose(first, second) else (first - second) / math.log(first / second)


def exponent(search: Search, record: Record) -> tuple[float, float]:
    """The exponent of the power law, and its standard error."""
    usual = INHERITED if search.is_trained(record.of) else FRESH
    before = search.study.find(record.of, record.rung - 1) if record.rung > 1 else None
    if before is None or not 0 < before.point.seconds < record.point.seconds:
        return usual, _USUAL_ERROR
    lost = [max(search.reference - each.point.validation, _LEAST_DROP) for each in (before, record)]
    slope = _FLATTER * math.log(lost[0] / lost[1]) / math.log(record.point.seconds / before.point.seconds)
    errors = [each.point.drop_error / drop for each, drop in zip((before, record), lost, strict=True)]
    error = max(0.05, math.hypot(*errors) / math.log(record.point.seconds / before.point.seconds))
    weight = _USUAL_ERROR**2 / (_USUAL_ERROR**2 + error**2)
    return weight * min(_FASTEST, max(_SLOWEST, slope)) + (1 - weight) * usual, _USUAL_ERROR * math.sqrt(1 - weight)
