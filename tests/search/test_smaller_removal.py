"""Candidates with less removed than a trained one that exceeds the allowed drop."""

import pytest

from search_fakes import searching
from tersor.search.candidate import Candidate, Removal
from tersor.search.compression_budget import Budget
from tersor.search.front import Point
from tersor.search.smaller_removal import smaller_removals
from tersor.search.study import Record


def record(of, *, lost, latency=0.64, rung=2, seconds=400.0, rounding=0.0, error=0.0):
    """A trial of a candidate; the 8-bit original among the fake baselines has a latency of 1 ms at batch size 1."""
    point = Point(
        name=of.name, description="", file="", runtime="", precision="int8", validation=90.0 - lost,
        latency_ms={1: latency, 128: 128 * latency}, bytes=1, macs=1, steps=9, seconds=seconds,
        drop_error=error,
    )  # fmt: skip
    return Record(candidate=of.parameters, rung=rung, point=point, rounding_loss=rounding)


@pytest.fixture
def search(tmp_path, monkeypatch):
    def with_records(*records, **budget):
        made = searching(tmp_path / "out", budget=Budget(**(budget or {"max_drop": 0.5})))
        monkeypatch.setattr(made.study, "records", lambda: records)
        return made

    return with_records


def test_the_expected_drop_is_the_third_power_of_the_share_of_the_latency(search):
    trained = record(Candidate(branches=10), lost=0.8)
    made = search(trained)
    expected = {each.of.branches: each for each in smaller_removals(made, [trained], seconds=400.0)}
    assert list(expected) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    half = expected[5]
    assert half.point.latency_ms == pytest.approx({1: 0.8, 128: 0.8 * 128})
    assert made.reference - half.point.validation == pytest.approx(0.8 * (0.2 / 0.36) ** 3)
    assert half.point.drop_error == pytest.approx(0.5 * 0.8 * (0.2 / 0.36) ** 3)
    assert (half.rung, half.point.steps, half.point.seconds) == (0, 0, 0.0)


def test_the_expected_drop_falls_with_the_square_root_of_the_time(search):
    trained = record(Candidate(keep_macs=0.5), lost=0.8)
    made = search(trained)
    drops = [
        {
            each.of.keep_macs: made.reference - each.point.validation
            for each in smaller_removals(made, [trained], seconds)
        }
        for seconds in (100.0, 1600.0)
    ]
    assert [each[0.75] for each in drops] == pytest.approx([1.6 * (0.2 / 0.36) ** 3, 0.4 * (0.2 / 0.36) ** 3])


def test_what_quantization_costs_does_not_depend_on_the_removal(search):
    trained = record(Candidate(branches=10), lost=0.8, rounding=0.4)
    made = search(trained)
    half = next(each for each in smaller_removals(made, [trained], 400.0) if each.of.branches == 5)
    assert made.reference - half.point.validation == pytest.approx(0.4 + 0.4 * (0.2 / 0.36) ** 3)


def test_the_error_of_the_measured_drop_is_part_of_the_estimated_error(search):
    trained = record(Candidate(branches=10), lost=0.8, error=0.6)
    half = next(each for each in smaller_removals(search(trained), [trained], 400.0) if each.of.branches == 5)
    assert half.point.drop_error == pytest.approx((0.4**2 + 0.6**2) ** 0.5 * (0.2 / 0.36) ** 3)


def test_longer_training_does_not_reduce_the_error_of_the_measured_drop(search):
    trained = record(Candidate(branches=10), lost=0.8, error=0.6, seconds=100.0)
    half = next(each for each in smaller_removals(search(trained), [trained], 400.0) if each.of.branches == 5)
    drop = 0.4 * (0.2 / 0.36) ** 3
    assert half.point.drop_error == pytest.approx(((drop / 2) ** 2 + (0.6 * (0.2 / 0.36) ** 3) ** 2) ** 0.5)


def test_a_candidate_that_was_trained_for_less_than_a_tenth_of_a_second_is_possible(search):
    trained = record(Candidate(branches=10), lost=0.8, seconds=0.0)
    assert smaller_removals(search(trained), [trained], 400.0)


def test_the_latency_and_size_of_a_surveyed_candidate_are_those_that_were_measured(search, monkeypatch):
    trained = record(Candidate(branches=10), lost=0.8)
    surveyed = record(Candidate(branches=5), lost=9.0, latency=0.9, rung=0)
    made = search(trained, surveyed)
    monkeypatch.setattr(made.study, "find", lambda of: surveyed if of == surveyed.of else None)
    half = next(each for each in smaller_removals(made, [trained], 400.0) if each.of.branches == 5)
    assert half.point.latency_ms == surveyed.point.latency_ms
    assert half.point.bytes == surveyed.point.bytes
    assert made.reference - half.point.validation == pytest.approx(0.8 * (0.1 / 0.36) ** 3)


def test_a_share_of_branches_and_channels_is_removed(search):
    trained = record(Candidate(branches=4, keep_macs=0.6), lost=0.8)
    found = [(each.of.branches, each.of.keep_macs) for each in smaller_removals(search(trained), [trained], 400.0)]
    assert found == [(0, 0.95), (1, 0.9), (2, 0.85), (2, 0.8), (2, 0.75), (3, 0.7), (4, 0.65)]


def test_of_the_long_trained_candidates_above_the_allowed_drop_the_best_is_used(search):
    short = record(Candidate(branches=2), lost=0.9, seconds=50.0)
    within = record(Candidate(branches=4), lost=0.4, seconds=900.0)
    later = record(Candidate(branches=6, later=(Removal(1),)), lost=0.9, seconds=900.0)
    worse = record(Candidate(branches=12), lost=1.5, seconds=500.0)
    student = record(Candidate("wide"), lost=0.6)
    trained = [short, within, later, worse, record(Candidate(branches=9), lost=0.9), student]
    found = smaller_removals(search(*trained), trained, seconds=50.0)
    assert [each.of.branches for each in found] == [1, 3, 5, 6, 7, 8], "2 and 4 were trained"


def test_nothing_is_returned_without_a_limit_on_the_drop_or_a_candidate_above_it(search):
    trained = record(Candidate(branches=10), lost=0.8)
    assert not smaller_removals(search(trained, latency_ms={1: 0.5}), [trained], 400.0)
    assert not smaller_removals(search(trained, max_drop=1.0), [trained], 400.0)
