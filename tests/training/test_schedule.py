from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.errors import InputError
from tersor.training.options import LearningRateSchedule
from tersor.training.schedule import curve, interpolate, learning_rate_factor

SHAPES = ("linear", "cubic", "cosine")
number = st.floats(-1e3, 1e3)


@pytest.mark.parametrize("shape", SHAPES)
@given(start=number, end=number)
def test_both_ends_are_exact(shape, start, end):
    assert interpolate(shape, 0, start, end) == start
    assert interpolate(shape, 1, start, end) == end


@pytest.mark.parametrize("shape", SHAPES)
@given(early=st.floats(0, 1), late=st.floats(0, 1))
def test_shapes_are_monotonic(shape, early, late):
    early, late = sorted((early, late))
    assert interpolate(shape, early, 0, 1) <= interpolate(shape, late, 0, 1)


def test_shapes_in_the_middle():
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


def test_step_drops_at_its_milestones():
    values = factors("step", milestones=(0.5, 0.75), factor=0.1)
    assert values[:50] == [1.0] * 50
    assert values[50:75] == [0.1] * 25
    assert values[75:] == pytest.approx([0.01] * 25)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "step"])
def test_the_warm_up_rises_to_one(name):
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
