"""Forecasts for changes of the original that were not trained, from one that was.

They are needed if every trained candidate exceeds the allowed drop: one with less removed may not. The drop grows
steeply with the latency that a change removes. A ResNet-56 without 9 of its 27 residual branches lost 0.48 points after
440 training steps, and 2.42 after 519 steps without 15 of them; with half of the time for each, that is a power of 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tersor.search.candidate import Candidate
from tersor.search.learning_curves import INHERITED
from tersor.search.search_context import Search
from tersor.search.study import Record

_STEEPNESS = 3.0
_ERROR = 0.5
"""One standard error of the logarithm of a forecast drop."""


def forecasts(search: Search, trained: Sequence[Record], seconds: float) -> list[Record]:
    """Surveyed changes of the original that remove less than a trained one, with their metric after training.

    Args:
        search: the search.
        trained: the latest trial of each trained candidate.
        seconds: time for training one of them.
    """
    if search.budget.points is None:
        return []
    records, baselines = search.study.records(), search.folder.state.baselines
    full = next((point.mean_ms for point in baselines if point.name == Candidate().name), math.inf)
    removed = {record.of.name: 1 - record.point.mean_ms / full for record in records if not record.rung}
    known = {record.of.name for record in records if record.rung} | search.study.failed.keys()
    changes = [each for each in trained if each.of.inherits and removed.get(each.of.name, 0.0) > 0]
    least = min(changes, key=lambda each: removed[each.of.name], default=None)
    if least is None:
        return []
    milder = [
        record
        for record in records
        if record.of.inherits and record.of.name not in known and 0 < removed[record.of.name] < removed[least.of.name]
    ]
    return [_forecast(search, each, least, removed[each.of.name] / removed[least.of.name], seconds) for each in milder]


def _forecast(search: Search, record: Record, trained: Record, share: float, seconds: float) -> Record:
    """The record of an untrained candidate with the metric that it would have after training.

    Args:
        search: the search.
        record: its record before training.
        trained: the latest trial of a candidate that removes more.
        share: what it removes, relative to `trained`.
        seconds: training time; not more than that of `trained` counts.
    """
    lost = max(0.0, search.reference - trained.point.validation)
    drop = lost * share**_STEEPNESS * max(1.0, trained.point.seconds / seconds) ** INHERITED
    point = record.point.model_copy(update={"validation": search.reference - drop, "drop_error": _ERROR * drop})
    return record.model_copy(update={"point": point})
