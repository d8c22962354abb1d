"""Milliseconds of interleaved rounds, and ratios of them with a 95 % interval. Needs numpy, never torch.

**Sources of variation.** Consecutive rounds are correlated: the machine drifts, and another process may run for a
second. And two sessions of the same file differ by a few percent as long as they are open, because of their memory
layout. More rounds of the same sessions reduce neither. So rounds are grouped, every group opens all sessions again,
and the bootstrap samples whole groups.

**Estimate and interval.** A ratio compares the times of one round. A group's value is the median of the logarithms of
its ratios, the estimate is the mean over groups, and 10,000 bootstrap samples draw groups with replacement. With so few
groups, percentile intervals are too narrow, so the percentiles are expanded as Hesterberg proposes ("What Teachers
Should Know About the Bootstrap", 2015, section 3.2), to the level at which a normal interval for a mean is as wide as
Student's t interval. Each end is then widened by the resolution of such a measurement: on a quiet machine the bootstrap
alone gave 0.3 % on either side, and two of ten comparisons of a file with itself missed 1 by 0.1 and 0.2 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

Groups: TypeAlias = Sequence[Sequence[float]]
"""Milliseconds per batch, `groups[group][round]`, in the order of measurement."""

EndedBy: TypeAlias = Literal["interval", "time"]
"""Why the measurement of a batch size ended: every interval is narrow, or the time limit is reached."""

NARROW = 0.1
"""An interval is narrow if its width is below this fraction of the ratio."""

RESOLUTION = 0.005
"""Largest difference between measurements of the same file that the groups do not show, as a fraction of the ratio."""

_SAMPLES = 10_000
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them the normal's, expanded (see `_quantile`)
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of latencies."""

    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True)
    median: float
    """Median, in milliseconds."""
    p10: float
    """10th percentile, in milliseconds."""
    p90: float
    """90th percentile, in milliseconds."""
    n: int
    """Number of rounds; the time of a round is the median of up to five runs."""

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of one or more values."""
        p10, median, p90 = np.percentile(values, (10, 50, 90)).tolist()
        return Spread(median, p10, p90, len(values))


@dataclass(frozen=True)
class Ratio:
    """A ratio of two latencies with its 95 % interval."""

    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True)
    value: float
    """Latency of the first file divided by that of the second."""
    low: float
    """Lower end of the 95 % interval of the ratio."""
    high: float
    """Upper end of the 95 % interval of the ratio."""
    n: int
    """Number of rounds."""
    groups: int
    """Number of groups of rounds; all files are opened again for each group."""

    @property
    def width(self) -> float:
        """Width of the interval as a fraction of the ratio."""
        return (self.high - self.low) / self.value

    @staticmethod
    def of(numerator: Groups, denominator: Groups) -> Ratio:
        """Ratio of times, paired by round. At least two groups."""
        pairs = list(zip(numerator, denominator, strict=True))
        assert len(pairs) > 1, "the variation between groups needs at least two"
        values = np.array([np.median(np.log(np.divide(*pair))) for pair in pairs])
        low, high = _interval(values)
        center = float(values.mean())
        low, high = low - RESOLUTION, high + RESOLUTION
        return Ratio(math.exp(center), math.exp(low), math.exp(high), sum(len(each) for each in numerator), len(pairs))


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    count = len(values)
    samples = np.random.default_rng(0).integers(count, size=(_SAMPLES, count))
    outside = NormalDist().cdf(-math.sqrt(count / (count - 1)) * _quantile(count - 1))
    low, high = np.quantile(values[samples].mean(axis=1), (outside, 1 - outside)).tolist()
    return low, high


def _quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t; beyond 15 degrees of freedom by an expansion, exact to 0.001."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    normal = NormalDist().inv_cdf(0.975)
    first = (normal**3 + normal) / 4
    second = (5 * normal**5 + 16 * normal**3 + 3 * normal) / 96
    return normal + first / freedom + second / freedom**2


@dataclass(frozen=True)
class Timings:
    """Measured latencies.

    Attributes:
        groups: `groups[model][batch size]`.
        ended_by: why the measurement ended, by batch size.
    """

    groups: Mapping[str, Mapping[int, Groups]]
    ended_by: Mapping[int, EndedBy]

    def spread(self, model: str, batch_size: int) -> Spread:
        """Milliseconds per batch, over all rounds."""
        return Spread.of([value for group in self.groups[model][batch_size] for value in group])

    def ratio(self, model: str, against: str, batch_size: int) -> Ratio:
        """Time of `model` divided by time of `against`; below 1 if `model` is faster."""
        return Ratio.of(self.groups[model][batch_size], self.groups[against][batch_size])

    def fastest(self, models: Iterable[str], batch_size: int) -> str:
        """The model with the smallest median."""
        return min(models, key=lambda name: self.spread(name, batch_size).median)
