"""The expected metric after more training: a power law of the time, fitted to a candidate's own rungs if possible.

The remaining loss of accuracy falls as a power of the training time (Hestness et al., "Deep Learning Scaling is
Predictable, Empirically", 2017): the whole error of a network that started from random weights, and the drop of one
that inherits the weights of the original. Without an earlier rung, the exponents are those below. They are estimates
that were not fitted to measurements.
"""

from __future__ import annotations

import math

from tersor.search.search_context import Search
from tersor.search.study import Record

FRESH, INHERITED = 0.6, 0.3
"""Exponents of the error of a fresh student, and of the drop of an inherited network."""
_SLOWEST, _FASTEST = 0.05, 1.0


def expected(search: Search, record: Record, seconds: float) -> float:
    """The metric of a trained candidate that is expected after `seconds` of training in total."""
    best = ceiling(search, record)
    left = best - record.point.validation
    if left <= 0 or record.point.seconds <= 0:
        return record.point.validation
    return best - left * max(1.0, seconds / record.point.seconds) ** -exponent(search, record)


def ceiling(search: Search, record: Record) -> float:
    """The metric that a candidate approaches: that of the original, or no error at all for a fresh student."""
    fresh = not record.of.inherits and search.bench.students[record.of.network] is None
    return 100.0 if fresh else search.reference


def exponent(search: Search, record: Record) -> float:
    """The exponent of the power law."""
    best = ceiling(search, record)
    before = search.study.find(record.of, record.rung - 1) if record.rung > 1 else None
    if before is None or not 0 < before.point.seconds < record.point.seconds:
        return FRESH if best > search.reference else INHERITED
    lost = [max(best - each.point.validation, 0.05) for each in (before, record)]
    slope = math.log(lost[0] / lost[1]) / math.log(record.point.seconds / before.point.seconds)
    return min(_FASTEST, max(_SLOWEST, slope))
