"""Further removal from a trained candidate that has not used the allowed drop, in single steps and full searches."""

import json
import math
from dataclasses import replace
from statistics import NormalDist

import pytest

from search_fakes import SPACE, FakeBench, FakeTime, baseline, run, searching
from tersor.core.errors import InputError
from tersor.recipe import Stage
from tersor.search import further_removal, halving
from tersor.search.candidate import Candidate, Removal
from tersor.search.compression_budget import Budget
from tersor.search.further_removal import Further, further_removals
from tersor.search.state import Rung
from tersor.search.study import Record

pytestmark = pytest.mark.usefixtures("fake_search")


def add(search, candidate, rung, validation, milliseconds, *, stages=(), **changed):
    point = baseline(f"{candidate.name}-{rung}", validation, milliseconds, "int8")
    point = point.model_copy(update={"free": False, "seconds": 30.0, **changed})
    made = Record(candidate=candidate.parameters, rung=rung, point=point, stages=list(stages))
    search.study.add(made)
    search.points.append(point)
    return made


def with_best(path, validation, candidate=None, budget=None, **changed):
    """A search with a reference of 90 %, in which a trained candidate with 0.6 of the latency and MACs is the best."""
    search = searching(path, budget=budget)
    changed = {"macs": 6 * 10**6, "drop_error": 0.1, **changed}
    best = add(search, candidate or Candidate(branches=1), 1, validation, 0.6, **changed)
    search.best = best.point
    return search, best


@pytest.mark.parametrize(
    ("validation", "seconds", "removed"),
    [
        (90.5, 100.0, 2),  # 8 of 9 branches are left: at most a quarter of them
        (89.8, 100.0, 2),
        (89.4, 100.0, 1),
        (89.1, 100.0, 1),
        (88.0, 100.0, None),
        (89.8, 15.1, 1),  # less training
    ],
)
def test_the_amount_of_removal_depends_on_the_drop_and_the_time(tmp_path, validation, seconds, removed):
    search, best = with_best(tmp_path / "out", validation)
    further = further_removals(search, [best], None, seconds)
    if removed is None:
        assert further == []
    else:
        assert further == [Further(replace(best.of, later=(Removal(branches=removed),)), best)]


def expected_gain(search, best, removal):
    """The expected improvement by another removal from a candidate with eight branches, if 100 s are left."""
    candidate, full = replace(best.of, later=(removal,)), search.folder.state.baselines[1]
    expected = further_removal._expected(search, candidate, best, full, [1 / 8] * 8, 100.0)
    return -further_removal._order(search, expected, 0.0)[1]


def test_the_expected_gain_matches_a_calculation_by_hand(tmp_path):
    search, best = with_best(tmp_path / "out", 89.4)
    # 30 s of training so far, and 100 s less 5 for the removal and 5 for export: four times as long in total
    drop = 0.6 / 4**0.5 + 0.6 * ((0.55 / 0.4) ** 3 - 1) * (30 / 90) ** 0.5
    within = NormalDist(drop, math.hypot(0.5 * drop, 0.1)).cdf(1.0)
    expected = within**2 * math.log(0.6 / 0.45)
    assert expected_gain(search, best, Removal(branches=2)) == pytest.approx(expected)


def test_what_quantization_costs_does_not_depend_on_the_removal(tmp_path):
    search, best = with_best(tmp_path / "out", 89.4)
    rounded = best.model_copy(update={"rounding_loss": 0.2})
    drop = 0.2 + 0.4 / 4**0.5 + 0.4 * ((0.55 / 0.4) ** 3 - 1) * (30 / 90) ** 0.5
    within = NormalDist(drop, math.hypot(0.5 * (drop - 0.2), 0.1)).cdf(1.0)
    expected = within**2 * math.log(0.6 / 0.45)
    assert expected_gain(search, rounded, Removal(branches=2)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("candidate", "macs", "exponent"),
    [
        (Candidate(keep_macs=0.6), 6 * 10**6, 1.0),
        (Candidate(keep_macs=0.36), 3.6 * 10**6, 0.5),  # 0.6 of the latency with 0.36 of the MACs
        (Candidate(keep_macs=0.9), 9 * 10**6, 1.0),  # at most
        (Candidate(branches=4, keep_macs=0.9), 6 * 10**6, 0.5),  # the usual one
    ],
)
def test_the_latency_without_channels_is_a_power_of_the_macs(tmp_path, candidate, macs, exponent):
    search, best = with_best(tmp_path / "out", 90.0, candidate, drop_error=1e-6, macs=int(macs))
    assert expected_gain(search, best, Removal(keep_macs=0.8)) == pytest.approx(-exponent * math.log(0.8))
    assert expected_gain(search, best, Removal(branches=2)) == pytest.approx(-math.log(0.75)), "of branches: the MACs"


@pytest.mark.parametrize(
    ("candidate", "changed"),
    [
        (Candidate(branches=1), {"latency_ms": {1: 1.0, 128: 128.0}}),  # not faster than the 8-bit original
        (Candidate(pixels=24), {}),
        (Candidate(branches=1, pixels=24), {}),
        (Candidate(bits="4"), {}),
    ],
)
def test_nothing_is_removed_if_the_latency_does_not_show_what_a_removal_saves(tmp_path, candidate, changed):
    search, best = with_best(tmp_path / "out", 90.0, candidate, **changed)
    assert further_removals(search, [best], None, 100.0) == []


def test_half_of_the_error_of_the_drop_is_the_least_assumed_drop(tmp_path):
    gains = []
    for number, validation in enumerate([90.0, 89.5, 89.4]):
        search, best = with_best(tmp_path / str(number), validation, drop_error=1.0)
        gains.append(expected_gain(search, best, Removal(branches=2)))
    assert gains[0] == pytest.approx(gains[1])
    assert gains[1] > gains[2]


def test_a_candidate_that_was_trained_for_less_than_a_tenth_of_a_second_is_possible(tmp_path):
    search, best = with_best(tmp_path / "out", 90.0, drop_error=0.0, seconds=0.0)
    assert further_removals(search, [best], None, 100.0)


def test_a_limit_on_the_latency_comes_before_the_expected_gain(tmp_path):
    search, best = with_best(tmp_path / "out", 90.0, budget=Budget(max_drop=1.0, latency_ms={1: 0.4}))
    slow = add(search, Candidate(branches=3), 1, 80.0, 0.5)
    fast = add(search, Candidate(branches=4), 1, 80.0, 0.4)
    for instead, count in ((slow, 1), (fast, 0)):
        assert len(further_removals(search, [best], instead, 100.0)) == count


def test_channels_are_removed_if_no_branches_are_left(tmp_path):
    search, best = with_best(tmp_path / "out", 89.8, candidate=Candidate(branches=8, keep_macs=0.5))
    (further,) = further_removals(search, [best], None, 100.0)
    assert further.candidate.later == (Removal(keep_macs=0.75),), "a quarter; one branch always stays"
    assert [each.keep_macs for each in further_removal._removals(1)] == [0.95, 0.9, 0.85, 0.8, 0.75]


def test_several_workers_remove_the_most_promising_amounts(tmp_path):
    search, best = with_best(tmp_path / "out", 89.4)
    later = [each.candidate.later[-1].branches for each in further_removals(search, [best], None, 100.0, 3)]
    assert later == [1, 2]


def test_nothing_is_removed_from_students_or_baselines_or_without_time_or_drop(tmp_path):
    search, best = with_best(tmp_path / "out", 90.0, candidate=Candidate("wide"))
    assert further_removals(search, [best], None, 100.0) == []
    search, best = with_best(tmp_path / "other", 90.0)
    assert further_removals(search, [best], None, 14.9) == [], "5 s to remove, 5 s of other work, 5 s of training"
    assert further_removals(search, [best], None, 15.1)
    search.best = search.points[0]
    assert further_removals(search, [best], None, 100.0) == []
    for number, budget in enumerate([Budget(latency_ms={1: 1.0}), Budget(max_drop=0.0)]):
        search, best = with_best(tmp_path / str(number), 90.0, budget=budget)
        assert further_removals(search, [best], None, 100.0) == []


def test_a_removal_is_tried_only_once(tmp_path):
    search, best = with_best(tmp_path / "out", 90.0)
    (further,) = further_removals(search, [best], None, 100.0)
    search.folder.state.rungs = [Rung(members={further.candidate.name: 2}, until=0.0)]
    (other,) = further_removals(search, [best], None, 100.0)
    assert other != further, "even if its rung had no time to train it"


def test_after_a_removal_that_failed_no_other_is_tried(tmp_path):
    search, best = with_best(tmp_path / "out", 90.0)
    (further,) = further_removals(search, [best], None, 100.0)
    search.study.fail(further.candidate, 2, "cannot be removed")
    assert further_removals(search, [best], None, 100.0) == []


def test_training_another_candidate_is_preferred_if_its_expected_gain_is_larger(tmp_path, monkeypatch):
    search, best = with_best(tmp_path / "out", 90.0, drop_error=1e-6)
    gained = -math.log(1 - 2 / 8)  # two of eight branches
    other, plain = add(search, Candidate(branches=3), 1, 88.9, 0.4), further_removal.gain
    for promised, count in ((1.01 * gained, 0), (0.99 * gained, 1)):

        def gain(search, record, seconds, promised=promised):
            return promised if record is other else plain(search, record, seconds)

        monkeypatch.setattr(further_removal, "gain", gain)
        assert len(further_removals(search, [best, other], other, 100.0)) == count


def test_a_rung_of_a_further_removal_matches_values_computed_by_hand(tmp_path):
    search, best = with_best(tmp_path / "out", 89.9)
    search.folder.state.rungs = [Rung(members={best.of.name: 1}, until=0.0)] * 2
    available = halving.seconds_to_train(search)
    rung = halving._rung(search, 3, 1)
    name = "original-branches1-then-branches2-8bit"
    assert rung.members == {name: 2}
    assert Candidate.of(rung.unsurveyed[name]) == Candidate(branches=1, later=(Removal(2),))
    assert rung.until == pytest.approx(search.clock.used + 0.5 * available)
    search.folder.state.extended = True
    search.folder.state.rungs[-1] = Rung(members={best.of.name: 1})
    assert halving._rung(search, 3, 1).until is None


@pytest.mark.parametrize(("available", "whole"), [(100.1, False), (99.9, True)])
def test_a_short_time_is_not_divided(tmp_path, available, whole):
    search, best = with_best(tmp_path / "out", 90.0)  # other work takes 5 s: at least ten times as long
    rung = halving._with_more_removed(search, [best], [], 1, available)
    assert (rung.until is None) is whole


def test_a_time_is_not_divided_if_the_first_part_is_too_short_for_training(tmp_path):
    search, best = with_best(tmp_path / "out", 90.0)
    search.folder.state.costs.step = 10.0  # removal 5 s, other work 5 s, and 20 steps
    assert halving._with_more_removed(search, [best], [], 1, 419.0).until is None
    assert halving._with_more_removed(search, [best], [], 1, 421.0).until is not None


def test_workers_without_a_further_removal_train_the_other_candidates(tmp_path):
    search, best = with_best(tmp_path / "out", 89.4)
    others = [add(search, Candidate(branches=count), rung, 60.0, 0.5) for count, rung in ((2, 0), (3, 2), (4, 2))]
    rung = halving._with_more_removed(search, [best], others, 3, 400.0)
    assert rung is not None
    assert rung.members == {
        "original-branches1-then-branches1-8bit": 2,
        "original-branches1-then-branches2-8bit": 2,
        others[1].of.name: 3,
    }
    assert len(rung.unsurveyed) == 2


def test_the_stages_before_a_further_removal_do_not_quantize():
    stages = [Stage(name=name).model_dump(mode="json") for name in ("train-1", "quantize")]
    point = baseline("a", 90.0, 1.0, "int8")
    made = Record(candidate=Candidate().parameters, rung=1, point=point, stages=stages)
    assert [stage.name for stage in further_removal.stages_before(made)] == ["train-1"]


def search_with_slack(path, time=None, bench=None):
    """A search in which training recovers the metric fast, so that more can be removed."""
    time = time or FakeTime()
    return searching(path, time=time, bench=bench or FakeBench(time), budget=Budget(max_drop=4.0))


def test_a_search_removes_more_from_a_trained_candidate(tmp_path):
    search = search_with_slack(tmp_path / "out")
    made = run(search)
    best = search.candidate_of(made.point(made.best))
    assert best.later
    assert made.point(made.best).validation >= 86.0
    assert 0.95 * search.clock.total <= search.clock.used <= 1.05 * search.clock.total
    record = next(each for each in search.study.records() if each.point.name == made.best)
    names = [stage["name"] for stage in record.stages]
    place = names.index("prune-2")
    assert names[0] == "train-1"
    assert names[place + 1].startswith("train-"), "it is trained again after the removal"
    (options,) = (each["channel_pruning"] for each in record.stages[place]["methods"])
    assert options.get("branches", 0) == best.later[0].branches
    assert f"{best.later[0].branches} more branch" in made.point(made.best).description


def test_an_interrupted_training_after_a_further_removal_is_resumed(tmp_path):
    time = FakeTime()
    whole = search_with_slack(tmp_path / "whole", time)
    run(whole)
    later = [number for number, what in enumerate(whole.bench.log) if what[0] == "train" and "then" in what[1]]
    for place in (later[0] - 1, later[0]):
        bench = FakeBench(FakeTime(), interrupt_at=place)
        search = search_with_slack(tmp_path / str(place), bench.time, bench)
        with pytest.raises(KeyboardInterrupt):
            run(search)
        assert json.loads((search.folder.path / "search.json").read_text())["rungs"]
        resumed = search_with_slack(tmp_path / str(place), bench.time, bench)
        run(resumed)
        trained = [what for what in bench.log if what[0] == "train"]
        assert len(trained) == len(set(trained)), "no finished training is repeated"
        assert any("then" in what[1] for what in trained)


def test_a_failing_removal_is_a_failed_trial(tmp_path):
    time = FakeTime()

    class Broken(FakeBench):
        def build(self, candidate, trained=()):
            if candidate.later:
                raise InputError("nothing can be removed")
            return super().build(candidate, trained)

    search = search_with_slack(tmp_path / "out", time, Broken(time))
    made = run(search)
    assert "nothing can be removed" in made.failed.values()
    assert not search.candidate_of(made.point(made.best)).later
    assert 0.95 * search.clock.total <= search.clock.used <= 1.05 * search.clock.total


def test_names_and_families_of_candidates_with_further_removals():
    candidate = Candidate(branches=3, later=(Removal(branches=1), Removal(keep_macs=0.8)))
    assert candidate.name == "original-branches3-then-branches1-then-macs80-8bit"
    assert str(candidate) == (
        "original, 3 branches removed, 1 more branch removed after training, "
        "pruned to at most 80 % of the remaining MACs after training, 8 bits"
    )
    assert candidate.family == "fewer branches and channels"
    assert candidate.parent == Candidate(branches=3, later=(Removal(branches=1),))
    assert Candidate.of(json.loads(json.dumps(candidate.parameters))) == candidate
    assert candidate.last_removal[0].name == "prune-3"
    assert SPACE.branches == 9
