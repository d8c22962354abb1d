"""Forecasts for candidates that were not trained."""

import pytest

from search_fakes import searching
from tersor.search.candidate import Candidate
from tersor.search.compression_budget import Budget
from tersor.search.forecast import forecasts
from tersor.search.front import Point
from tersor.search.study import Record


def record(branches, removed, *, rung=0, lost=0.0, seconds=0.0):
    """A trial of the original without some branches and without a share of its latency."""
    of = Candidate(branches=branches)
    full = {1: 1.0, 128: 128.0}  # the latency of the 8-bit original among the fake baselines
    point = Point(
        name=of.name, description="", file="", runtime="", precision="int8", validation=90.0 - lost,
        latency_ms={size: (1 - removed) * value for size, value in full.items()}, bytes=1, macs=1, seconds=seconds,
    )  # fmt: skip
    return Record(candidate=of.parameters, rung=rung, point=point)


@pytest.fixture
def search(tmp_path, monkeypatch):
    def with_records(records, **budget):
        made = searching(tmp_path / "out", budget=Budget(**(budget or {"max_drop": 0.5})))
        monkeypatch.setattr(made.study, "records", lambda: records)
        return made

    return with_records


def test_a_forecast_drop_is_the_third_power_of_the_removed_share_of_the_latency(search):
    trained = record(8, 0.4, rung=2, lost=0.8, seconds=400.0)
    made = search([record(8, 0.4, lost=20.0), record(4, 0.2, lost=5.0), trained])
    (found,) = forecasts(made, [trained], seconds=400.0)
    assert found.of == Candidate(branches=4)
    assert made.reference - found.point.validation == pytest.approx(0.8 / 2**3)
    assert found.point.drop_error == pytest.approx(0.5 * 0.1)
    assert found.rung == 0


def test_the_forecast_drop_grows_with_the_square_root_of_the_time_that_is_missing(search):
    trained = record(8, 0.4, rung=2, lost=0.8, seconds=400.0)
    made = search([record(8, 0.4), record(4, 0.2), trained])
    drops = [made.reference - forecasts(made, [trained], seconds)[0].point.validation for seconds in (100.0, 800.0)]
    assert drops == pytest.approx([0.2, 0.1])


def test_the_trained_candidate_with_least_removed_is_the_reference_and_larger_removals_have_no_forecast(search):
    trained = [record(8, 0.4, rung=2, lost=9.0, seconds=9.0), record(6, 0.3, rung=1, lost=0.8, seconds=50.0)]
    surveyed = [record(branches, branches / 20) for branches in (2, 3, 6, 7, 8)]
    made = search([*surveyed, *trained])
    found = forecasts(made, trained, seconds=50.0)
    assert [each.of.branches for each in found] == [2, 3]
    assert made.reference - found[1].point.validation == pytest.approx(0.1)


def test_without_a_limit_on_the_drop_or_a_trained_change_nothing_is_forecast(search):
    trained = record(8, 0.4, rung=2, lost=0.8, seconds=400.0)
    records = [record(8, 0.4), record(4, 0.2), trained]
    assert not forecasts(search(records, latency_ms={1: 0.5}), [trained], 400.0)
    assert not forecasts(search(records), [], 400.0)
