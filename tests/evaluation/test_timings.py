"""Ratios and their intervals, for simulated times with a known ratio."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tersor.evaluation import timings
from tersor.evaluation.timings import NARROW, RESOLUTION, Ratio, Spread, Timings, _quantile


def test_a_spread_contains_percentiles():
    assert Spread.of([float(value) for value in range(101)]) == Spread(50.0, 10.0, 90.0, 101)


CLOSEST = math.exp(RESOLUTION)
"""Smallest ratio between an end of an interval and its value."""


def test_ratios_pair_the_times_of_a_round():
    drifting = Timings({"slow": {1: [[2.0, 20.0], [200.0]]}, "fast": {1: [[1.0, 10.0], [100.0]]}}, {1: "time"})
    ratio = drifting.ratio("slow", "fast", 1)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2 / CLOSEST, 2 * CLOSEST))
    assert (ratio.n, ratio.groups) == (3, 2)
    assert drifting.ratio("fast", "slow", 1).value == pytest.approx(0.5)
    assert drifting.spread("slow", 1).median == 20
    assert drifting.fastest(["slow", "fast"], 1) == "fast"


def test_the_inverse_of_a_ratio_has_the_inverse_interval():
    draw = np.random.default_rng(0)
    one, other = draw.lognormal(0, 0.3, (2, 9, 5)).tolist()
    ratio, inverse = Ratio.of(one, other), Ratio.of(other, one)
    assert (1 / inverse.value, 1 / inverse.high, 1 / inverse.low) == pytest.approx(
        (ratio.value, ratio.low, ratio.high), rel=0.02
    )
    assert Ratio.of(one, other) == ratio, "the samples are seeded"


def test_an_outlier_in_a_group_has_no_effect():
    calm = [[1.0] * 5] * 8
    disturbed = [[1.0, 1.0, 50.0, 1.0, 1.0]] * 8
    assert Ratio.of(disturbed, calm).high == pytest.approx(CLOSEST)


def test_the_width_of_an_interval_is_relative():
    assert Ratio(2, 1.9, 2.1, 8, 8).width == pytest.approx(0.1)


@pytest.mark.parametrize("freedom", [1, 7, 15, 16, 25, 100])
def test_quantiles_of_students_t(freedom):
    assert _quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=2e-3)


def test_for_normal_values_the_interval_is_as_wide_as_students_t_interval():
    """A plain percentile interval of eight values is 23 % too narrow."""
    draw = np.random.default_rng(0)
    widths = []
    for _ in range(200):
        values = draw.standard_normal(8)
        low, high = timings._interval(values)
        widths.append((high - low) / (2 * stats.t.ppf(0.975, 7) * values.std(ddof=1) / math.sqrt(8)))
    assert np.mean(widths) == pytest.approx(1, abs=0.05)


class Machine:
    """A simulation of two sessions on a noisy machine.

    Args:
        ratio: true ratio of their times.
        noise: relative noise of a round; `memory` is its correlation with the next round.
        opened: relative difference between two sessions as long as they are open.
        drift: relative change of both from round to round.
        spikes: fraction of the rounds in which one of them takes about twice as long.
    """

    def __init__(self, seed, ratio=1.0, noise=0.03, memory=0.0, opened=0.0, drift=0.0, spikes=0.0):
        self.draw = np.random.default_rng(seed)
        self.ratio, self.noise, self.memory, self.opened = ratio, noise, memory, opened
        self.drift, self.spikes = drift, spikes
        self.level, self.state = 0.0, np.zeros(2)

    def round(self):
        self.level += self.draw.normal(0, self.drift)
        kept = math.sqrt(1 - self.memory**2)
        self.state = self.memory * self.state + kept * self.draw.normal(0, self.noise, 2)
        late = 1 + self.draw.exponential(1, 2) * (self.draw.random(2) < self.spikes)
        return np.exp(self.level + self.state) * late

    def measured(self, fewest=8, most=14, rounds=10):
        """Measure groups as `measure_latency` does, until the interval is narrow or `most` is reached."""
        slow, fast = [], []
        while True:
            offset = math.exp(self.draw.normal(0, self.opened))
            for _ in range(rounds):  # opening and warm-up take as long as a group
                self.round()
            taken = np.array([self.round() for _ in range(rounds)])
            slow.append((self.ratio * offset * taken[:, 0]).tolist())
            fast.append(taken[:, 1].tolist())
            if len(slow) >= fewest and (Ratio.of(slow, fast).width < NARROW or len(slow) == most):
                return Ratio.of(slow, fast)


@pytest.mark.parametrize("ratio", [1.0, 2.0])
@pytest.mark.parametrize(
    "machine",
    [
        {},
        {"drift": 0.05},
        {"opened": 0.04},
        {"memory": 0.8, "drift": 0.02},
        {"noise": 0.2, "memory": 0.5, "opened": 0.1, "drift": 0.05, "spikes": 0.2},
    ],
    ids=["quiet", "drift", "sessions differ", "correlated rounds", "all"],
)
def test_the_interval_covers_the_true_ratio(machine, ratio, monkeypatch):
    monkeypatch.setattr(timings, "_SAMPLES", 1000)
    found = [Machine(seed, ratio, **machine).measured() for seed in range(100)]
    covered = sum(each.low <= ratio <= each.high for each in found)
    assert covered >= 90
