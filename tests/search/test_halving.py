"""The phases of a search on fake networks and a fake clock: the plan and budgets."""

import itertools
import json

import optuna
import pytest

import search_fakes
from search_fakes import (
    FLOAT,
    INTEGERS,
    SPACE,
    STORAGES,
    FakeBench,
    FakeTime,
    baseline,
    metric,
    relative_ms,
    run,
    searching,
    without_measurements,
)
from tersor.search import halving, rung_training
from tersor.search.candidate import Candidate
from tersor.search.compression_budget import Budget
from tersor.search.finish import write_front
from tersor.search.folder import read_front
from tersor.search.front import dominates
from tersor.search.halving import halve
from tersor.search.plan import RUNG_SIZES
from tersor.search.promotion import promoted
from tersor.search.rung_training import seconds_to_train
from tersor.search.space import Space
from tersor.search.survey import feasible_range, survey
from tersor.tasks.classification import Classification
from tersor.tasks.functions import FromFunctions

pytestmark = pytest.mark.usefixtures("fake_search")


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """A finished search of ten minutes, its front, and the arguments of `promoted` in each rung; tests only read it."""
    requested = []

    def promote(search, trained, count, seconds, *, last):
        requested.append((len(trained), count, seconds / seconds_to_train(search), last))
        return promoted(search, trained, count, seconds, last=last)

    with pytest.MonkeyPatch.context() as patch:
        without_measurements(patch)
        patch.setattr(halving, "promoted", promote)
        search = searching(tmp_path_factory.mktemp("search") / "out")
        return search, run(search), requested


@pytest.fixture
def finished(observed):
    return observed[:2]


def test_the_time_given_is_used(finished):
    search, _ = finished
    assert 0.95 * search.clock.total <= search.clock.used <= 1.05 * search.clock.total


def test_of_the_free_baselines_only_the_8_bit_original_is_recorded_as_a_trial_and_only_once(tmp_path):
    for _ in range(2):
        search = searching(tmp_path / "out")
        search.folder.state.seen = False
        search.folder.state.baselines[1:1] = [baseline("original-bfloat16", FLOAT, 1.5, "bfloat16")]
        feasible_range(search)
        assert [record.point.name for record in search.study.records()] == [Candidate().name]
        assert sum(each.n_trials for each in optuna.get_all_study_summaries(STORAGES[tmp_path / "out"])) == 1


@pytest.mark.parametrize("moment", [30, 150, 300, 450])
def test_the_plan_is_kept_if_the_machine_slows_down(tmp_path, moment):
    time = FakeTime()
    bench = FakeBench(time)
    search = searching(tmp_path / "out", time=time, bench=bench)
    began, work, train = time.seconds, time.work, bench.train

    def slow(seconds):
        time.slowness = 2.0 if time.seconds - began > moment else 1.0
        work(seconds)

    time.work = slow
    bench.train = train
    run(search)
    assert 0.95 * search.clock.total <= search.clock.used <= 1.05 * search.clock.total


def test_rungs_get_smaller_and_one_candidate_gets_the_remaining_time(finished):
    search, _ = finished
    sizes = [len(rung.members) for rung in search.folder.state.rungs]
    assert all(size <= most for size, most in itertools.zip_longest(sizes, RUNG_SIZES, fillvalue=1))
    assert sizes[0] > sizes[1] > sizes[-1] == 1
    last = {name for rung in search.folder.state.rungs if len(rung.members) == 1 for name in rung.members}
    longest = max(search.bench.trained, key=search.bench.trained.get)
    assert longest.name in last
    assert search.bench.trained[longest] > 0.35 * sum(search.bench.trained.values())


def test_if_the_promising_candidate_stays_above_the_allowed_drop_a_slower_one_is_trained(tmp_path, monkeypatch):
    def plateau(candidate, seconds):
        lost = INTEGERS - metric(candidate, seconds)
        return INTEGERS - (lost if relative_ms(candidate) > 0.7 else max(lost, 1.0))

    monkeypatch.setattr(search_fakes, "metric", plateau)
    search = searching(tmp_path / "out")
    run(search)
    alone = [next(iter(rung.members)) for rung in search.folder.state.rungs if len(rung.members) == 1]
    assert len(set(alone)) > 1
    assert not search.best.free
    assert search.best.validation >= search.reference - search.budget.points


@pytest.mark.parametrize("left", [0.0, 1.0])
def test_a_search_without_time_after_a_planned_rung_ends(tmp_path, left):
    time = FakeTime()
    search = searching(tmp_path / "out", time=time, budget=Budget(max_drop=0.01))
    survey(search, SPACE)
    original = search.bench.train

    def slow(candidate, trained, seconds):
        if len(search.folder.state.rungs) == 3:
            time.seconds += seconds_to_train(search) - seconds - 4 - left
        return original(candidate, trained, seconds)

    search.bench.train = slow
    halve(search)
    assert len(search.folder.state.rungs) == 3
    assert search.folder.state.rungs[-1].until is not None


def test_students_and_pruned_originals_compete(finished):
    search, _ = finished
    first = search.folder.state.rungs[0].members
    assert "wide-8bit" in first
    assert any(name.startswith("original") for name in first)
    assert "deep-8bit" not in first  # slower than the 8-bit original


def test_no_point_of_the_front_is_dominated(finished):
    _, made = finished
    assert len(made.points) > 1
    everything = [*made.points, *made.dominated]
    assert not [(a.name, b.name) for a in everything for b in made.points if dominates(a, b)]
    assert all(any(dominates(a, b) for a in made.points) for b in made.dominated)


def test_the_test_set_is_used_once_for_the_reported_points(finished):
    search, made = finished
    tests = [what for what in search.bench.log if what[0] == "test"]
    assert len(tests) == len(set(tests)) or sum(point.free for point in made.baselines) > 1
    assert all(point.test is not None for point in made.points)
    assert all(point.test is None for point in made.dominated if not point.free)
    assert search.bench.log.index(tests[0]) == len(search.bench.log) - len(tests)


def test_if_the_budget_cannot_be_met_the_nearest_point_is_chosen_with_advice(tmp_path):
    search = searching(tmp_path / "out", budget=Budget(max_drop=0.1, latency_ms={1: 0.2}))
    made = run(search)
    assert not made.met
    assert "times the limit" in made.shortfall or "more than allowed" in made.shortfall
    assert any("Larger drop" in line or "More time" in line for line in made.advice)
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert read_front(tmp_path / "out") == made


def test_with_hardly_any_time_the_best_baseline_is_chosen(tmp_path):
    search = searching(tmp_path / "out", minutes=0.1)
    made = run(search)
    assert made.best == Candidate().name
    assert made.met
    assert not search.folder.state.rungs


def test_students_are_trained_if_the_network_cannot_be_pruned(tmp_path):
    search = searching(tmp_path / "out")
    search.bench.broken = tuple(each.name for each in SPACE.first() if each.inherits)
    survey(search, Space(branches=0, prunable=False, students=["wide", "deep"]))
    halve(search)
    made = write_front(search, finished=True)
    assert list(search.folder.state.rungs[0].members) == ["wide-8bit"]
    assert made.point(made.best).validation >= 10


def test_a_broken_candidate_is_a_failed_trial_with_its_reason(tmp_path):
    search = searching(tmp_path / "out")
    search.bench.broken = (Candidate(branches=3).name,)
    made = run(search)
    assert made.failed == {Candidate(branches=3).name: "cannot be built"}
    attempts = [what for what in search.bench.log if what == ("build", Candidate(branches=3).name)]
    assert len(attempts) == 1


def test_without_a_limit_on_the_drop_the_most_accurate_point_within_the_latency_is_chosen(tmp_path):
    search = searching(tmp_path / "out", budget=Budget(latency_ms={1: 0.8}))
    made = run(search)
    best = made.point(made.best)
    assert best.latency_ms[1] <= 0.8
    within = [point for point in made.points if point.latency_ms[1] <= 0.8]
    assert best.validation == max(point.validation for point in within)


def test_every_point_of_the_front_has_its_file_recipe_and_numbers(finished):
    search, made = finished
    for point in itertools.chain(made.points, made.dominated):
        folder = (search.folder.path / point.file).parent
        assert (search.folder.path / point.file).is_file()
        if not point.free:
            assert (folder / "recipe.yaml").is_file()
            assert json.loads((folder / "numbers.json").read_text())["name"] == point.name
    assert (search.folder.path / "report.html").is_file()


def test_the_number_of_steps_is_limited_if_the_time_of_a_step_is_unknown(tmp_path):
    search = searching(tmp_path / "out")
    search.folder.state.costs.step = 0.0
    run(search)
    assert max(stages[-1].steps for _, stages in search.bench.given) <= 10**6


def test_quantization_aware_training_is_also_chosen_with_a_users_metric(tmp_path):
    time = FakeTime()
    bench = FakeBench(time, rounding=1.0)
    bench.experiment.task = FromFunctions(Classification(), None, lambda *_: 0.5)
    search = searching(tmp_path / "out", time=time, bench=bench)
    survey(search, SPACE)
    halve(search)
    assert bench.given[-1][1][-1].name == "quantize"
    assert {abs(round(record.rounding_loss, 6)) for record in search.study.records() if record.rung} == {0.0, 1.0}


def test_seconds_steps_and_names_of_each_training_are_recorded(finished):
    search, _ = finished
    records = {(record.of.name, record.rung): record for record in search.study.records() if record.rung}
    assert len(records) == sum(what[0] == "train" for what in search.bench.log)
    seconds = dict.fromkeys((name for name, _ in records), 0.0)
    for (name, rung), record in sorted(records.items(), key=lambda item: item[0][1]):
        assert record.point.name == f"{name}-{100 * rung}steps"
        assert record.point.file == f"points/{record.point.name}/model.onnx"
        assert not record.point.free
        assert [stage["name"] for stage in record.stages] == [f"train-{number + 1}" for number in range(rung)]
        assert record.point.steps == 100 * rung, "as many as were made in each training run"
        assert record.point.seconds > seconds[name]
        seconds[name] = record.point.seconds
    trained = {candidate.name: value for candidate, value in search.bench.trained.items()}
    assert seconds == pytest.approx(trained, abs=0.1)
    costs = search.folder.state.costs
    assert (costs.export, costs.attach) == pytest.approx((3.0, 1.0)), "in the fake, attaching is building"
    assert costs.training == pytest.approx(4.0, abs=1.1), "and one second for the latency of a new file"
    for name, stages in search.bench.given:
        if len(stages) == 1 and (name, 2) not in records:  # ten times the steps that the original makes in the time
            assert stages[0].steps == pytest.approx(10 * trained[name] / 0.1, abs=20)


def test_the_first_rung_matches_values_computed_by_hand(tmp_path):
    search = searching(tmp_path / "out")
    survey(search, SPACE)
    used, tested = search.clock.used, len(search.tested_at_the_end())
    available = 600.0 - used - (0.005 * 600 + 1.5 * 2 * 5.0 + (tested + 1) * 1.0)
    rung = halving._rung(search, 1, 1)
    assert len(rung.members) == 6
    assert set(rung.members.values()) == {1}
    least = 5.0 + 5.0  # attached, exported and timed in 5 s, as in the survey, and trained as long
    assert rung.until == pytest.approx(used + max(0.16 * available, min(0.35 * available, 6 * least)))
    search.clock.total = used + 55.0
    short = halving._rung(search, 1, 1)
    final = 1.5 * 2 * min(5.0, 0.03 * search.clock.total)
    available = 55.0 - min(0.3 * search.clock.total, 0.005 * search.clock.total + final + (tested + 1) * 1.0)
    assert 0.35 * available < least < available, "too little for a share, enough for a single candidate"
    assert len(short.members) == 1
    assert short.until is None, "a single candidate gets all of the time"


def test_rungs_are_chosen_for_the_time_that_their_best_is_trained_further(observed):
    search, _, requested = observed
    # the second of (16, 20, 50) percent, and two more: after it, four fifths of the time are left for the best;
    # those that are not expected to end within the drop are left out
    assert requested[0] == (6, 3, pytest.approx(0.8), False)
    assert [each[1:] for each in requested[1:]] == [(1, pytest.approx(1.0), late) for late in (False, True, True)]
    assert 6 < requested[1][0] <= 6 + 9, "the trained ones, and candidates with less removed"
    ends = [rung.until for rung in search.folder.state.rungs]
    assert ends[-1] is None
    assert ends[:-1] == sorted(ends[:-1])


def test_quantization_aware_training_gets_a_quarter_of_the_last_training_steps(tmp_path):
    time = FakeTime()
    bench = FakeBench(time, rounding=1.0)
    search = searching(tmp_path / "out", time=time, bench=bench)
    run(search)
    (name, stages), (_, both) = bench.given[-2:]
    assert both[:-1] == stages
    assert stages[-1].steps == pytest.approx(3 * both[-1].steps, rel=0.01)
    made = max((record for record in search.study.records() if record.of.name == name), key=lambda each: each.rung)
    assert made.rounding_loss == 0
    assert made.point.steps == 100 * len(both)
    assert made.point.seconds == pytest.approx(bench.trained[made.of], abs=0.1)
    alone = [stages for _, stages in bench.given if stages[-1].name == "quantize"]
    assert len(alone) == 1, "only the last training quantizes"
    assert len(search.folder.state.rungs) <= len(RUNG_SIZES), "the last rung is not divided"


def test_a_training_shorter_than_earlier_ones_is_marked_as_settled(finished):
    search, _ = finished
    before = max((record for record in search.study.records() if record.rung), key=lambda each: each.point.seconds)
    for limit, settled in ((before.point.seconds - 0.2, True), (before.point.seconds + 0.2, False)):
        rung_training._planned(search, before.of, before.rung + 1, before, [], limit, last=True)
        assert search.bench.settled[-1] is settled
    rung_training._planned(search, before.of, 1, None, [], 1.0, last=True)
    assert search.bench.settled[-1] is False
    (least,) = rung_training._planned(search, before.of, 1, None, [], 1e-6, last=False)
    assert (least.name, least.steps) == ("train-1", 1)
