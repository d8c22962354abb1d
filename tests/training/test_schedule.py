from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.errors import InputError
from tersor.training.options import LearningRateSchedule
from tersor.training.schedule import curve, interpolate, learning_rate_factor, rates_in_time

SHAPES = ("linear", "cubic", "cosine")
number = st.floats(-1e3, 1e3)


@pytest.mark.parametrize("shape", SHAPES)
@given(start=number, end=number)
def test_the_ends_of_a_shape_are_exact(shape, start, end):
    assert interpolate(shape, 0, start, end) == start
    assert interpolate(shape, 1, start, end) == end


@pytest.mark.parametrize("shape", SHAPES)
@given(early=st.floats(0, 1), late=st.floats(0, 1))
def test_shapes_are_monotonic(shape, early, late):
    early, late = sorted((early, late))
    assert interpolate(shape, early, 0, 1) <= interpolate(shape, late, 0, 1)


def test_values_of_shapes_in_the_middle():
    assert interpolate("constant", 0.0, 0, 8) == 8
    assert interpolate("linear", 0.5, 0, 8) == 4
    assert interpolate("cubic", 0.5, 0, 8) == 7
    assert interpolate("cosine", 0.5, 0, 8) == pytest.approx(4)
    assert interpolate("cosine", 0.25, 0, 8) == pytest.approx(4 * (1 - math.sqrt(0.5)))


def factors(name, steps=100, warmup=0, **options):
    schedule = LearningRateSchedule(name=name, **options)
    return [learning_rate_factor(schedule, step, steps, warmup) for step in range(steps)]


def test_schedules_start_at_one_and_end_low():
    assert factors("constant") == [1.0] * 100
    for name, last in (("linear", 0.01), ("cosine", (1 + math.cos(0.99 * math.pi)) / 2)):
        values = factors(name)
        assert values[0] == 1
        assert values[-1] == pytest.approx(last)
        assert values == sorted(values, reverse=True)


def test_the_step_schedule_drops_at_its_milestones():
    values = factors("step", milestones=(0.5, 0.75), factor=0.1)
    assert values[:50] == [1.0] * 50
    assert values[50:75] == [0.1] * 25
    assert values[75:] == pytest.approx([0.01] * 25)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "step"])
def test_the_warm_up_rises_to_1(name):
    values = factors(name, warmup=10)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert values[10] == 1
    assert max(values) == 1


def halfway(progress):
    return 0.5 * progress


def text(progress):
    return str(progress)


def test_a_curve_is_a_shape_or_a_function():
    assert curve("cubic")(0.5) == 0.875
    assert curve("linear")(0.25) == 0.25
    assert curve(f"{__name__}:halfway")(0.5) == 0.25
    with pytest.raises(InputError, match=r"returned '0\.0' at progress 0\. Return a number from 0 to 1"):
        curve(f"{__name__}:text")
    with pytest.raises(InputError, match=r"has no 'halfways'\. Did you mean 'halfway'"):
        curve(f"{__name__}:halfways")


@pytest.mark.parametrize("slowness", [0.5, 1.0, 2.0, 40.0])
def test_with_a_time_limit_the_schedule_ends_in_time(slowness):
    rates = [1 - step / 100 for step in range(100)]
    steps = itertools.count()
    used = list(rates_in_time(rates, 0, lambda: slowness * next(steps), seconds=60.0))
    elapsed = slowness * len(used)
    assert used == sorted(used, reverse=True)
    assert used[0] == rates[0]
    assert elapsed <= 60 + slowness
    assert used[-1] <= 1.01 - (elapsed - slowness) / 60


def test_without_a_time_limit_every_rate_is_used():
    assert list(rates_in_time([3.0, 2.0, 1.0], 1, lambda: 1e9, seconds=None)) == [2.0, 1.0]


def test_without_time_left_only_the_first_step_is_made():
    assert list(rates_in_time([3.0, 2.0], 0, lambda: 100.0, seconds=1.0)) == [2.0]
    assert list(rates_in_time([3.0, 2.0], 1, lambda: 100.0, seconds=1.0)) == []
