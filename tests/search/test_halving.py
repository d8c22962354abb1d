"""The phases of a search on fake networks and a fake clock: the plan, resuming, interruptions, budgets."""

import itertools
import json

import optuna
import pytest

from search_fakes import FLOAT, STORAGES, FakeBench, FakeTime, baseline, latencies, searching
from tersor.search import finish
from tersor.search.candidate import Candidate
from tersor.search.compression_budget import Budget
from tersor.search.finish import write_front
from tersor.search.folder import read_front
from tersor.search.front import dominates, rank
from tersor.search.halving import halve
from tersor.search.plan import RUNG_SIZES
from tersor.search.space import Space
from tersor.search.survey import feasible_range, survey

SPACE = Space(branches=9, prunable=True, students=["wide", "deep"])


@pytest.fixture(autouse=True)
def _fake_files(monkeypatch):
    kept = [round(0.1 + 0.05 * step, 2) for step in range(19)]
    latencies(
        [Candidate("wide"), Candidate("deep")]
        + [Candidate(branches=b, keep_macs=k, bits=w) for b in range(10) for k in kept for w in ("8", "4", "mixed")]
    )
    monkeypatch.setattr(finish, "_speedup", lambda _search, _best: {})


def run(search):
    """All phases after the feasible range."""
    survey(search, SPACE)
    halve(search)
    return write_front(search, finished=True)


def test_the_time_given_is_used(tmp_path):
    search = searching(tmp_path / "out")
    run(search)
    assert 0.95 * search.clock.total <= search.clock.used <= 1.05 * search.clock.total


def test_of_the_free_baselines_only_the_original_in_8_bits_is_a_trial_and_only_once(tmp_path):
    for _ in range(2):
        search = searching(tmp_path / "out")
        search.folder.state.seen = False
        search.folder.state.baselines[1:1] = [baseline("original-bfloat16", FLOAT, 1.5, "bfloat16")]
        feasible_range(search)
        assert [record.point.name for record in search.study.records()] == [Candidate().name]
        assert sum(each.n_trials for each in optuna.get_all_study_summaries(STORAGES[tmp_path / "out"])) == 1


@pytest.mark.parametrize("moment", [30, 150, 300, 450])
def test_the_plan_holds_when_the_machine_slows_down_by_half(tmp_path, moment):
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


def test_the_rungs_get_smaller_and_one_candidate_gets_the_rest(tmp_path):
    search = searching(tmp_path / "out")
    run(search)
    sizes = [len(rung.members) for rung in search.folder.state.rungs]
    assert len(sizes) <= len(RUNG_SIZES)
    assert all(size <= most for size, most in zip(sizes, RUNG_SIZES, strict=False))
    assert sizes[0] > sizes[1] > sizes[-1] == 1
    last = {name for rung in search.folder.state.rungs if len(rung.members) == 1 for name in rung.members}
    longest = max(search.bench.trained, key=search.bench.trained.get)
    assert longest.name in last
    assert search.bench.trained[longest] > 0.4 * sum(search.bench.trained.values())


def test_students_and_the_original_compete(tmp_path):
    search = searching(tmp_path / "out")
    run(search)
    first = search.folder.state.rungs[0].members
    assert "wide-8bit" in first
    assert any(name.startswith("original") for name in first)
    assert "deep-8bit" not in first  # slower than the original in 8 bits


def test_no_point_of_the_front_is_dominated(tmp_path):
    search = searching(tmp_path / "out")
    made = run(search)
    assert len(made.points) > 1
    everything = [*made.points, *made.dominated]
    assert not [(a.name, b.name) for a in everything for b in made.points if dominates(a, b)]
    assert all(any(dominates(a, b) for a in made.points) for b in made.dominated)


def test_the_test_set_is_used_once_for_points_that_are_handed_over(tmp_path):
    search = searching(tmp_path / "out")
    made = run(search)
    tests = [what for what in search.bench.log if what[0] == "test"]
    assert len(tests) == len(set(tests)) or sum(point.free for point in made.baselines) > 1
    assert all(point.test is not None for point in made.points)
    assert all(point.test is None for point in made.dominated if not point.free)
    assert search.bench.log.index(tests[0]) == len(search.bench.log) - len(tests)


def test_ctrl_c_at_any_moment_leaves_a_valid_folder_and_the_search_goes_on(tmp_path):
    whole = searching(tmp_path / "whole")
    run(whole)
    pieces = len(whole.bench.log)
    for number, moment in enumerate(range(0, pieces, 13)):
        out = tmp_path / str(number)
        time = FakeTime()
        bench = FakeBench(time, interrupt_at=moment)
        search = searching(out, time=time, bench=bench)
        before = search.best
        with pytest.raises(KeyboardInterrupt):
            run(search)
        search.save()
        write_front(search, finished=False)
        handed = (out / "model.onnx").read_text()
        assert handed == (out / search.best.file).read_text()
        assert rank(search.best, search.budget, search.reference) <= rank(before, search.budget, search.reference)
        done = {(record.of.name, record.rung) for record in search.study.records()}
        resumed = searching(out, time=time, bench=bench)
        assert (out / "model.onnx").read_text() == handed
        position = len(bench.log)
        run(resumed)
        again = {(what[1], int(what[2].removeprefix("train-"))) for what in bench.log[position:] if what[0] == "train"}
        assert not again & done
        assert resumed.clock.used <= 1.05 * resumed.clock.total
        assert rank(resumed.best, resumed.budget, resumed.reference) <= rank(
            search.best, search.budget, search.reference
        )


def test_a_finished_trial_is_never_run_twice(tmp_path):
    search = searching(tmp_path / "out")
    run(search)
    once = [what for what in search.bench.log if what[0] == "train"]
    assert len(once) == len(set(once))
    again = searching(tmp_path / "out", time=search.bench.time, bench=search.bench)
    position = len(again.bench.log)
    run(again)
    assert [what[0] for what in again.bench.log[position:] if what[0] != "test"] == []


def test_a_budget_that_cannot_be_met_hands_over_the_nearest_point_and_says_what_would_help(tmp_path):
    search = searching(tmp_path / "out", budget=Budget(max_drop=0.1, latency_ms={1: 0.2}))
    made = run(search)
    assert not made.met
    assert "times the limit" in made.shortfall or "more than allowed" in made.shortfall
    assert any("Larger drop" in line or "More time" in line for line in made.advice)
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert read_front(tmp_path / "out") == made


def test_hardly_any_time_hands_over_the_best_baseline(tmp_path):
    search = searching(tmp_path / "out", minutes=0.1)
    made = run(search)
    assert made.best == Candidate().name
    assert made.met
    assert not search.folder.state.rungs


def test_a_network_that_cannot_be_pruned_leaves_the_students(tmp_path):
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


def test_without_a_drop_the_most_accurate_within_the_latency_is_chosen(tmp_path):
    search = searching(tmp_path / "out", budget=Budget(latency_ms={1: 0.8}))
    made = run(search)
    best = made.point(made.best)
    assert best.latency_ms[1] <= 0.8
    within = [point for point in made.points if point.latency_ms[1] <= 0.8]
    assert best.validation == max(point.validation for point in within)


def test_every_point_of_the_front_has_its_file_recipe_and_numbers(tmp_path):
    search = searching(tmp_path / "out")
    made = run(search)
    for point in itertools.chain(made.points, made.dominated):
        folder = (tmp_path / "out" / point.file).parent
        assert (tmp_path / "out" / point.file).is_file()
        if not point.free:
            assert (folder / "recipe.yaml").is_file()
            assert json.loads((folder / "numbers.json").read_text())["name"] == point.name
    assert (tmp_path / "out" / "report.html").is_file()


def test_more_time_for_a_finished_search_goes_to_the_last_candidate(tmp_path):
    search = searching(tmp_path / "out")
    made = run(search)
    (last,) = search.folder.state.rungs[-1].members
    search.folder.state.finished = True
    search.save()
    longer = searching(tmp_path / "out", minutes=20.0, time=search.bench.time, bench=search.bench)
    position = len(longer.bench.log)
    again = run(longer)
    trained = [what for what in longer.bench.log[position:] if what[0] == "train"]
    assert [what[1] for what in trained] == [last]
    assert 0.95 * longer.clock.total <= longer.clock.used <= 1.05 * longer.clock.total
    assert again.point(again.best).seconds > made.point(made.best).seconds


def test_after_quantization_aware_training_more_time_trains_the_float_network(tmp_path):
    time = FakeTime()
    search = searching(tmp_path / "out", time=time, bench=FakeBench(time, rounding=1.0))
    run(search)
    name, stages = search.bench.given[-1]
    assert [stage.name for stage in stages][-1] == "quantize"
    search.folder.state.finished = True
    search.save()
    longer = searching(tmp_path / "out", minutes=20.0, time=time, bench=search.bench)
    run(longer)
    assert not longer.study.failed
    after = [[stage.name for stage in each] for who, each in longer.bench.given if who == name][-2:]
    kept, new = [stage.name for stage in stages[:-1]], f"train-{len(stages)}"
    assert after == [[*kept, new], [*kept, new, "quantize"]]


def test_a_resumed_training_has_the_stage_of_the_interrupted_one_and_keeps_the_cost_of_attaching(tmp_path):
    whole = searching(tmp_path / "whole")
    run(whole)
    trainings = [place for place, what in enumerate(whole.bench.log) if what[0] == "train"]
    for moment in trainings:
        time = FakeTime()
        bench = FakeBench(time, interrupt_at=moment)
        search = searching(tmp_path / str(moment), time=time, bench=bench)
        with pytest.raises(KeyboardInterrupt):
            run(search)
        search.save()
        begun = len(bench.given)
        attach = search.folder.state.costs.attach
        bench.interrupt_at = moment + 1  # the export
        resumed = searching(tmp_path / str(moment), time=time, bench=bench)
        with pytest.raises(KeyboardInterrupt):
            run(resumed)
        assert bench.given[begun] == bench.given[begun - 1]
        bench.interrupt_at = moment + 2
        with pytest.raises(KeyboardInterrupt):
            run(searching(tmp_path / str(moment), time=time, bench=bench))
        assert resumed.folder.state.costs.attach == attach


def test_without_the_time_of_a_step_the_number_of_steps_is_limited(tmp_path):
    search = searching(tmp_path / "out")
    search.folder.state.costs.step = 0.0
    run(search)
    assert max(stages[-1].steps for _, stages in search.bench.given) <= 10**6


def test_more_time_for_a_finished_search_without_training_surveys_and_trains(tmp_path):
    search = searching(tmp_path / "out", minutes=0.1)
    run(search)
    search.folder.state.finished = True
    search.save()
    longer = searching(tmp_path / "out", minutes=10.0, time=search.bench.time, bench=search.bench)
    run(longer)
    assert len(longer.folder.state.rungs) > 1
    assert 0.95 * longer.clock.total <= longer.clock.used <= 1.05 * longer.clock.total


def test_an_extended_search_that_is_interrupted_is_not_finished_and_goes_on_with_its_last_candidate(tmp_path):
    search = searching(tmp_path / "out")
    run(search)
    (last,) = search.folder.state.rungs[-1].members
    search.folder.state.finished = True
    search.save()
    bench = search.bench
    bench.interrupt_at = len(bench.log) + 2  # the export after the training
    longer = searching(tmp_path / "out", minutes=20.0, time=bench.time, bench=bench)
    with pytest.raises(KeyboardInterrupt):
        run(longer)
    longer.save()
    again = searching(tmp_path / "out", minutes=40.0, time=bench.time, bench=bench)
    assert not again.folder.state.finished
    position = len(bench.log)
    run(again)
    assert {what[1] for what in bench.log[position:] if what[0] == "train"} == {last}
