"""The Pareto front, the point chosen for a budget, and the text form of budgets."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.core.errors import InputError
from tersor.search.compression_budget import Budget, parse_latency, parse_size, parse_time
from tersor.search.front import Point, dominates, front, pick, shortfall, violations


def point(name, validation, milliseconds, size=1000, error=0.0):
    return Point(
        name=name,
        description=name,
        file=f"points/{name}/model.onnx",
        runtime="onnxruntime",
        precision="int8",
        validation=validation,
        latency_ms={1: milliseconds, 32: 20 * milliseconds},
        latency_error={1: error, 32: error},
        bytes=size,
        macs=1,
    )


POINTS = [
    point("slow", 90.0, 4.0, 4_000_000),
    point("int8", 89.8, 2.0, 1_000_000),
    point("half", 89.2, 1.0, 500_000),
    point("tiny", 80.0, 0.3, 100_000),
    point("useless", 79.0, 0.5, 200_000),
]


@given(st.lists(st.tuples(st.integers(80, 90), st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=12))
def test_the_front_contains_exactly_the_points_that_are_not_dominated(values):
    points = [point(str(number), float(a), float(b), c) for number, (a, b, c) in enumerate(values)]
    kept = front(points)
    assert kept
    for each in points:
        worse = any(
            other.validation >= each.validation
            and all(other.latency_ms[size] <= each.latency_ms[size] for size in (1, 32))
            and other.bytes <= each.bytes
            and (other.validation, other.latency_ms, other.bytes) != (each.validation, each.latency_ms, each.bytes)
            for other in points
        )
        same = [(k.validation, k.latency_ms, k.bytes) for k in kept]
        assert ((each.validation, each.latency_ms, each.bytes) in same) is not worse
    assert [each.mean_ms for each in kept] == sorted(each.mean_ms for each in kept)


def test_of_equal_points_the_first_is_kept():
    kept = front([point("a", 90.0, 1.0), point("b", 90.0, 1.0)])
    assert [each.name for each in kept] == ["a"]
    assert not dominates(kept[0], kept[0])


def test_sizes_that_differ_by_less_than_one_percent_are_treated_as_equal():
    better, smaller = point("better", 90.0, 1.0, 27_517), point("smaller", 86.0, 1.0, 27_500)
    for points in ([better, smaller], [smaller, better]):
        assert front(points) == [better]
        for budget in (Budget(max_drop=10), Budget(megabytes=0.02), Budget(max_drop=10, megabytes=0.02)):
            assert pick(points, budget, 90.0) == better, "also where neither meets the limit"
    assert dominates(better, smaller)
    assert not dominates(smaller, better)
    much_smaller = point("much smaller", 86.0, 1.0, 27_000)
    assert len(front([better, much_smaller])) == 2
    assert pick([better, much_smaller], Budget(max_drop=10), 90.0) == much_smaller


def test_latencies_are_treated_as_equal_if_the_interval_of_their_ratio_contains_1():
    # the errors 3 % and 4 % of two independent ratios give 5 % for the ratio of both
    better, faster = point("better", 90.0, 1.04, error=0.03), point("faster", 89.5, 1.0, error=0.04)
    for points in ([better, faster], [faster, better]):
        assert front(points) == [better]
        assert pick(points, Budget(max_drop=1), 90.0) == better
        assert pick(points, Budget(latency_ms={1: 0.5}, max_drop=1), 90.0) == better, "equally far from the limit"
        assert pick(points, Budget(latency_ms={1: 1.02}, max_drop=1), 90.0) == faster, "only one meets the limit"
    slow = point("slow", 90.0, 1.06, error=0.03)
    assert len(front([slow, faster])) == 2
    assert pick([slow, faster], Budget(max_drop=1), 90.0) == faster


def test_small_differences_do_not_add_up():
    chain = [point(str(step), 90.0 - step, 1.04**-step, error=0.03) for step in range(3)]
    for points in (chain, chain[::-1]):
        assert [each.name for each in front(points)] == ["2", "0"]
        assert pick(points, Budget(max_drop=5), 90.0).name == "1", "equal to the fastest, and better"


def test_of_points_that_are_equal_in_everything_the_first_is_kept():
    first, second = point("first", 90.0, 1.0, 1003, error=0.02), point("second", 90.0, 0.99, 1000, error=0.02)
    for points in ([first, second], [second, first]):
        assert front(points) == points[:1]
        assert pick(points, Budget(max_drop=1), 90.0) == points[0]


def test_the_best_point_is_always_on_the_front():
    assert [each.name for each in front(POINTS, POINTS[-1])] == ["tiny", "useless", "half", "int8", "slow"]


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        (Budget(), "half"),  # one point at most, the fastest
        (Budget(max_drop=0.5), "int8"),
        (Budget(max_drop=0), "slow"),
        (Budget(max_drop=20), "tiny"),
        (Budget(latency_ms={1: 2.5}), "int8"),  # the most accurate within the latency
        (Budget(latency_ms={1: 2.5, 32: 25}), "half"),
        (Budget(megabytes=0.3), "tiny"),
        (Budget(max_drop=0.9, megabytes=0.6), "half"),
        (Budget(max_drop=0.1, latency_ms={1: 1.9}), "int8"),  # not met: 0.1 points and 5 % are near
    ],
)
def test_a_budget_picks(budget, name):
    chosen = pick(POINTS, budget, 90.0)
    assert chosen.name == name
    assert bool(shortfall(chosen, budget, 90.0)) is bool(violations(chosen, budget, 90.0))


def test_the_shortfall_of_a_point_is_described_with_numbers():
    text = shortfall(POINTS[3], Budget(max_drop=1, latency_ms={1: 0.1}, megabytes=0.05), 90.0)
    assert text == (
        "it loses 10.00 points, 9.00 more than allowed; it takes 0.300 ms at batch 1, 3.00 times the limit; "
        "it is 0.100 MB, 2.00 times the limit"
    )


@pytest.mark.parametrize(
    ("milliseconds", "error", "shown"),
    [
        (0.68512, 0.03, "0.685 ± 0.021"),
        (0.98765, 0.0, "0.988"),
        (12.345, 0.005, "12.3 ± 0.1"),  # rounded up: an error is never shown too small
        (256.4, 0.1, "256 ± 26"),
        (1234.5, 0.02, "1234 ± 25"),
        (0.0123, 0.5, "0.0123 ± 0.0062"),
    ],
)
def test_a_latency_is_shown_with_its_error(milliseconds, error, shown):
    assert point("a", 90.0, milliseconds, error=error).milliseconds(1) == shown


def test_all_latencies_are_shown_with_their_errors():
    assert point("a", 90.0, 2.0, error=0.03).latencies == "2.00 ± 0.06 ms at batch 1, 40.0 ± 1.2 ms at batch 32"


def test_an_excess_within_the_measurement_error_is_described_as_such():
    near = point("near", 90.0, 2.02, 50_017, error=0.02)
    assert shortfall(near, Budget(latency_ms={1: 2.0}, megabytes=0.05), 90.0) == (
        "it takes 2.02 ± 0.05 ms at batch 1, 1.00 % above the limit, within the measurement error; "
        "it is 0.050 MB, 0.03 % above the limit"
    )


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (parse_latency, ["1:2ms,128:8ms"], {1: 2.0, 128: 8.0}),
        (parse_latency, ["0.5ms"], {1: 0.5}),
        (parse_latency, [" 4:250us , 8:1s"], {4: 0.25, 8: 1000.0}),
        (parse_size, "0.5MB", 0.5),
        (parse_size, "500kB", 0.5),
        (parse_time, "45m", 45.0),
        (parse_time, "90s", 1.5),
        (parse_time, "2h", 120.0),
    ],
)
def test_quantities_are_parsed(read, text, value):
    assert read(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        *[(parse_latency, [text]) for text in ("", "2", "a:2ms", "1:2MB", "1:2ms,", "1:0ms", "-1:2ms")],
        *[(parse_size, text) for text in ("", "0.5", "MB", "0MB", "5m")],
        *[(parse_time, text) for text in ("", "45", "-1m", "0m", "m", "1e9m")],
    ],
)
def test_errors_for_wrong_quantities_explain_what_to_write(read, text):
    with pytest.raises(InputError, match="Write"):
        read(text)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_drop": -1},
        {"max_drop": float("nan")},
        {"max_drop": True},
        {"megabytes": 0},
        {"minutes": 0},
        {"minutes": float("inf")},
        {"latency_ms": 2.0},
        {"latency_ms": {0: 2.0}},
        {"latency_ms": {1: 0.0}},
        {"latency_ms": {"1": 2.0}},
    ],
)
def test_impossible_budgets_raise(limits):
    with pytest.raises(InputError, match="Write"):
        Budget(**limits)


def test_a_budget_is_described_in_words():
    assert str(Budget()) == "at most 1 point lost"
    assert str(Budget(max_drop=2)) == "at most 2 points lost"
    assert str(Budget(latency_ms={1: 2.0}, megabytes=0.5)) == "2 ms at batch 1, 0.5 MB"


def test_a_budget_is_restored_from_its_numbers():
    for budget in (Budget(max_drop=2), Budget(latency_ms={1: 2.0, 32: 9.0}), Budget(max_drop=0.5, megabytes=0.5)):
        assert Budget.of_numbers(json.loads(json.dumps(budget.as_numbers()))) == budget
