"""The time of a search: a clock that survives interruptions, and the share of each phase."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

SURVEY = 0.2
"""Share of the time that is left after the start for the survey of the candidates."""
RUNGS = (0.3, 0.4)
"""Shares of the training time that is left, for every rung but the last, which gets the rest."""
RESERVE = 0.02
"""Share of the whole time that is reserved for delays at the end."""
MOST_RESERVED = 0.2
MOST = 8
"""Candidates in the first rung."""
_LEAST_STEPS = 20


class Clock:
    """Seconds that a search has used, those of earlier processes included.

    Args:
        minutes: time of the search.
        used: seconds that earlier processes used.
        now: a clock in seconds.
    """

    def __init__(self, minutes: float, used: float = 0.0, now: Callable[[], float] = time.monotonic) -> None:
        self.total = 60 * minutes
        self._now = now
        self._start = now() - used

    @property
    def used(self) -> float:
        """Seconds used."""
        return self._now() - self._start

    @property
    def left(self) -> float:
        """Seconds left; below 0 when more than the time was used."""
        return self.total - self.used


@dataclass
class Costs:
    """Seconds that each kind of work takes on this machine, as last measured.

    Attributes:
        survey: to build, export, validate and time a candidate.
        attach: to attach the methods of a training.
        export: to quantize, export and validate a trained candidate.
        step: one training step of the original.
        test: to run one file on the test set.
        finish: everything after the last training, except exports and tests.
    """

    survey: float = 0.0
    attach: float = 0.0
    export: float = 0.0
    step: float = 0.0
    test: float = 0.0
    finish: float = 0.0

    def reserve(self, total: float, points: int) -> float:
        """Seconds to reserve for the end, with this number of points to test."""
        return min(MOST_RESERVED * total, RESERVE * total + self.finish + points * self.test)

    def entrants(self, seconds: float) -> int:
        """Number of candidates for a rung of this many seconds, so that each has enough time to train."""
        each = self.attach + self.export
        least = each + max(_LEAST_STEPS * self.step, each)
        return max(0, min(MOST, int(seconds / max(least, 1e-9))))
