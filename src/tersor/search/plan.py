"""The time of a search: a clock that survives interruptions, and the share of each phase."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

_SURVEY, _SURVEY_OF_SHORT, _SHORT = 0.1, 0.2, 120.0
"""The survey gets a tenth of the time that is left after the start; a fifth, but at most 120 s, if that is more."""
RUNGS = (0.16, 0.2, 0.5)
"""Shares of the training time that is left, for every rung but the last, which gets the rest."""
LEAST_FIRST = 0.35
"""Share for the first rung where there is little time, so that several candidates can be compared."""
RUNG_SIZES = (6, 3, 1, 1)
"""Largest number of candidates in each rung."""
RESERVE = 0.005
"""Share of the whole time that is reserved for delays at the end."""
MOST_RESERVED = 0.3
_LATENCY, _LATENCY_SHARE = 2.0, 0.012
"""Seconds of the measurement of a candidate for each batch size, and at most this share of the whole time."""
_SPEEDUP, _SPEEDUP_SHARE = 5.0, 0.03
"""Minimum seconds of the final measurement for each batch size, and at most this share of the whole time."""
AGAIN = 0.5
"""Least time of a second final measurement relative to the first, if the first point proves slower than another."""
_GROUPS_AT_THE_END = 2.0
"""Least time of the final measurement relative to that of the free baselines: it has fewer files, but more groups."""
PROFILED_RUNS = 10
"""Runs in which the nodes of a file are timed, at each batch size."""
_PROFILE = 2.0
"""Time of a profile relative to that of its runs."""
_LEAST_STEPS = 20


def survey_seconds(left: float) -> float:
    """Seconds for the survey of the candidates, if `left` seconds remain for survey and training."""
    return max(_SURVEY * left, min(_SURVEY_OF_SHORT * left, _SHORT))


def latency_seconds(total: float) -> float:
    """Seconds of the measurement of a candidate for each batch size."""
    return min(_LATENCY, _LATENCY_SHARE * total)


def speedup_seconds(total: float) -> float:
    """Minimum seconds of the final measurement for each batch size; it gets longer if there is time left."""
    return min(_SPEEDUP, _SPEEDUP_SHARE * total)


class Clock:
    """Seconds that a search has used, including those of earlier processes.

    Attributes:
        minutes: time of the search.
        total: the same time in seconds.

    Args:
        minutes: time of the search.
        used: seconds that earlier processes used.
        now: a clock in seconds.
    """

    def __init__(self, minutes: float, used: float = 0.0, now: Callable[[], float] = time.monotonic) -> None:
        self.minutes, self.total = minutes, 60 * minutes
        self._now = now
        self._start = now() - used

    @property
    def used(self) -> float:
        """Seconds used."""
        return self._now() - self._start

    @property
    def left(self) -> float:
        """Seconds left; negative once the time is exceeded."""
        return self.total - self.used


@dataclass
class Costs:
    """Seconds that each kind of work takes on this machine, as last measured.

    Attributes:
        survey: to build, export, validate and time a candidate.
        attach: to attach the methods of a training run.
        training: of a training run apart from its steps; 0 before the first one.
        export: to quantize, export and validate a trained candidate.
        step: one training step of the original.
        test: to run one file on the test set.
        latency: to measure the latency of a trained candidate, unless one of the same structure was measured.
        finish: to measure the free baselines.
        runs: to run the original once at each batch size.
        open: to open a file as often as its profile does.
        layers: to name the layers of the original.
    """

    survey: float = 0.0
    attach: float = 0.0
    training: float = 0.0
    export: float = 0.0
    step: float = 0.0
    test: float = 0.0
    finish: float = 0.0
    runs: float = 0.0
    latency: float = 0.0
    open: float = 0.0
    layers: float = 0.0

    def reserve(self, total: float, points: int, sizes: int) -> float:
        """Seconds to reserve for the end.

        Args:
            total: seconds of the whole search.
            points: number of points to test and profile.
            sizes: number of batch sizes.
        """
        final = max((1 + AGAIN) * sizes * speedup_seconds(total), _GROUPS_AT_THE_END * self.finish)
        needed = RESERVE * total + final + points * self.test + self.evidence(points)
        return min(MOST_RESERVED * total, needed)

    def evidence(self, points: int) -> float:
        """Seconds for the layers and the profiles of this number of points."""
        return self.layers + points * (self.open + _PROFILE * PROFILED_RUNS * self.runs)

    def entrants(self, seconds: float, at_once: int = 1) -> int:
        """Number of candidates for a rung of this many seconds, so that each has enough time to train.

        Args:
            seconds: seconds of the rung.
            at_once: number of candidates that are trained at the same time.
        """
        trained = int(at_once * seconds / max(self.least, 1e-9))
        if at_once > 1:  # exports and measurements are made one after another
            trained = min(trained, int(seconds / max(2 * (self.export + self.latency), 1e-9)))
        return max(0, min(RUNG_SIZES[0] * at_once, trained))

    @property
    def overhead(self) -> float:
        """Seconds of a training run apart from its steps.

        Before the first one, they are estimated, as at least those of surveying a candidate.
        """
        return self.training or max(self.attach + self.export + self.latency, self.survey)

    @property
    def least(self) -> float:
        """Seconds of a short training run, half of which are spent on steps."""
        return self.overhead + max(_LEAST_STEPS * self.step, self.overhead)
