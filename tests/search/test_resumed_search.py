"""Interrupted and extended searches, and the end of a search, with fake networks and a fake clock."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest

from search_fakes import SPACE, FakeBench, FakeTime, run, searching
from tersor.evaluation.timings import Ratio
from tersor.search import finish
from tersor.search.compression_budget import Budget
from tersor.search.finish import write_front
from tersor.search.folder import SearchFolder, read_front
from tersor.search.front import rank

compress = importlib.import_module("tersor.search.compress")
SPEEDUP = finish._speedup
pytestmark = pytest.mark.usefixtures("fake_search")


def test_ctrl_c_at_any_time_leaves_a_valid_folder_and_the_search_can_be_resumed(tmp_path):
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


def test_a_finished_trial_is_never_repeated(tmp_path):
    search = searching(tmp_path / "out")
    run(search)
    once = [what for what in search.bench.log if what[0] == "train"]
    assert len(once) == len(set(once))
    again = searching(tmp_path / "out", time=search.bench.time, bench=search.bench)
    position = len(again.bench.log)
    run(again)
    assert again.bench.log[position:] == [], "not even on the test images"


@pytest.mark.usefixtures("_no_other_removal")
def test_more_time_for_a_finished_search_is_used_for_the_last_candidate(tmp_path):
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


def test_more_time_for_a_finished_search_can_be_used_to_remove_more(tmp_path):
    search = searching(tmp_path / "out", budget=Budget(max_drop=4.0))
    made = run(search)
    search.folder.state.finished = True
    search.save()
    again = {"time": search.bench.time, "bench": search.bench, "budget": Budget(max_drop=4.0)}
    longer = searching(tmp_path / "out", minutes=20.0, **again)
    known, position = {record.of for record in search.study.records()}, len(longer.bench.log)
    extended = run(longer)
    new = [record.of for record in longer.study.records() if record.rung and record.of not in known]
    assert len(new) == 1
    assert new[0].later
    assert new[0].name in [what[1] for what in longer.bench.log[position:] if what[0] == "train"]
    assert 0.95 * longer.clock.total <= longer.clock.used <= 1.05 * longer.clock.total
    assert extended.point(extended.best).mean_ms <= made.point(made.best).mean_ms


@pytest.mark.usefixtures("_no_other_removal")
def test_after_quantization_aware_training_more_time_is_used_to_train_the_float_network(tmp_path):
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


def test_a_resumed_training_has_the_stage_of_the_interrupted_one_and_the_same_cost_of_attaching(tmp_path):
    whole = searching(tmp_path / "whole")
    run(whole)
    trainings = [place for place, what in enumerate(whole.bench.log) if what[0] == "train"]
    for moment in trainings[::5]:
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


def test_more_time_for_a_finished_search_without_training_is_used_to_survey_and_train(tmp_path):
    search = searching(tmp_path / "out", minutes=0.1)
    run(search)
    search.folder.state.finished = True
    search.save()
    longer = searching(tmp_path / "out", minutes=10.0, time=search.bench.time, bench=search.bench)
    run(longer)
    assert len(longer.folder.state.rungs) > 1
    assert 0.95 * longer.clock.total <= longer.clock.used <= 1.05 * longer.clock.total


@pytest.mark.usefixtures("_no_other_removal")
def test_an_interrupted_extension_is_unfinished_and_continues_with_its_last_candidate(tmp_path):
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


@pytest.fixture
def _only_the_end(monkeypatch):
    monkeypatch.setattr(compress, "feasible_range", lambda _search: None)
    monkeypatch.setattr(compress, "describe_range", lambda _search: [])
    monkeypatch.setattr(compress, "space_of", lambda *_: SPACE)


@pytest.mark.usefixtures("_only_the_end")
@pytest.mark.parametrize("export", [3.0, 60.0])
def test_an_extension_surveys_if_it_cannot_train_and_states_why_it_ends(tmp_path, monkeypatch, export):
    """The first minute is too short for a candidate; in the extension, training is possible or not."""
    monkeypatch.setattr(compress, "write_evidence", lambda *_: None)
    search, lines = searching(tmp_path / "out", minutes=0.2), []
    compress._run(search, SimpleNamespace(pixels=()))
    assert not search.folder.state.rungs
    search.folder.state.costs.attach = export
    search.save()
    longer = searching(tmp_path / "out", minutes=2.0, time=search.bench.time, bench=search.bench)
    longer.bar.tell = lines.append
    before = len(longer.study.records())
    compress._run(longer, SimpleNamespace(pixels=()))
    assert lines[0].startswith("resuming: 0.")
    assert lines[0].endswith(f" of 2 minutes are used; measurements of candidates so far: {before}")
    assert len(longer.study.records()) > before + 4
    trained = bool(longer.folder.state.rungs)
    assert trained is (export < 60)
    if not trained:
        assert longer.clock.used > 0.6 * longer.clock.total
        assert any(line.startswith("training ends: training a candidate takes at least 2") for line in lines)


@pytest.mark.usefixtures("_only_the_end")
def test_an_error_in_the_evidence_does_not_undo_the_end_of_a_search(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("the profile failed")

    monkeypatch.setattr(compress, "write_evidence", broken)
    search = searching(tmp_path / "out", minutes=0.1)
    with pytest.raises(RuntimeError, match="the profile failed"):
        compress._run(search, SimpleNamespace(pixels=()))
    assert SearchFolder(tmp_path / "out", search.folder.state.arguments).state.finished


@pytest.mark.usefixtures("_only_the_end")
def test_the_time_of_the_evidence_is_counted_and_it_gets_the_predictions_on_the_test_images(tmp_path, monkeypatch):
    search = searching(tmp_path / "out", minutes=0.1)
    given = []

    def slow(_search, _front, tested):
        given.extend(tested.values())
        search.bench.time.work(60.0)

    monkeypatch.setattr(compress, "write_evidence", slow)
    began = search.clock.used
    made = compress._run(search, SimpleNamespace(pixels=()))
    assert made.minutes_used >= (began + 60) / 60
    assert read_front(tmp_path / "out") == made
    assert len(given) == sum(point.test is not None for point in made.points + made.dominated)
    assert all(each.classes.tolist() == [0] * 22 + [1] * 3 for each in given)


@pytest.mark.usefixtures("_only_the_end")
@pytest.mark.parametrize("gain", [20.0, 0.01])
def test_a_search_of_three_minutes_ends_within_five_percent_of_its_time(tmp_path, monkeypatch, gain):
    """The final measurement uses all its time, and three points are timed if the first ones are slow."""
    search = searching(tmp_path / "out", minutes=3.0, budget=Budget(max_drop=20))
    costs, work = search.folder.state.costs, search.bench.time.work
    costs.layers, costs.open, costs.runs, costs.test = 4.0, 1.0, 0.05, 1.0
    timings = SimpleNamespace(fastest=lambda names, _: names[0], ratio=lambda *_: Ratio(gain, gain, gain, 9, 3))
    measured = []

    def measure(*_, seconds, **__):
        work(2 * seconds)
        measured.append(seconds)
        return timings

    monkeypatch.setattr(finish, "_speedup", SPEEDUP)
    monkeypatch.setattr(finish, "measure_latency", measure)
    monkeypatch.setattr(compress, "write_evidence", lambda _search, _front, tested: work(4.0 + 2.0 * len(tested)))
    search.bench.example = lambda _candidate: np.zeros((1, 3, 8, 8))
    made = compress._run(search, SimpleNamespace(pixels=()))
    assert len(measured) == {20.0: 1, 0.01: 3}[gain]
    assert made.minutes_used == pytest.approx(3.0, rel=0.05)


def test_searches_in_equally_named_folders_have_different_studies_and_a_moved_folder_keeps_its_own(tmp_path):
    folders = [SearchFolder(tmp_path / parent / "out", {}) for parent in ("a", "b")]
    names = [folder.state.study for folder in folders]
    assert names[0] != names[1]
    with folders[0].held():
        pass
    (tmp_path / "a").rename(tmp_path / "c")
    assert SearchFolder(tmp_path / "c" / "out", {}).state.study == names[0]
