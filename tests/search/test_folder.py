"""The folder of a search: its contents, what is kept, and errors; the range of the free baselines."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from recorded_progress import RecordedProgress
from search_fakes import FakeBench, FakeTime, baseline, searching
from tersor.core.errors import InputError
from tersor.search import end_costs, rest_of_time
from tersor.search import survey as surveys
from tersor.search.candidate import Candidate
from tersor.search.compression_budget import Budget
from tersor.search.folder import MODEL, RECIPE, SearchFolder, read_front
from tersor.search.plan import Clock
from tersor.search.range_description import describe_range
from tersor.search.rung_training import seconds_to_train
from tersor.search.search_context import TimeBar
from tersor.search.space import Space
from tersor.search.state import Rung
from tersor.search.survey import feasible_range, space_of, survey


def test_the_state_is_read_again_and_belongs_to_its_arguments(tmp_path):
    folder = SearchFolder(tmp_path / "out", {"budget": "a"})
    with folder.held():
        folder.state.rungs.append(Rung(members={"x": 1}, until=5.0))
        folder.state.seen = True
        folder.state.baselines = [baseline("original", 90.0, 2.0, "float32")]
        folder.save()
        again = SearchFolder(tmp_path / "out", {"budget": "a"})
        with pytest.raises(InputError, match="another search is running"), again.held():
            pass
    with again.held():
        pass
    assert again.state == folder.state
    for other in ({"budget": "b"}, {}, {"budget": "a", "seed": "1"}):
        with pytest.raises(InputError, match="belongs to a search with"):
            SearchFolder(tmp_path / "out", other)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="already exists"):
        SearchFolder(tmp_path / "file", {})
    (tmp_path / "empty").mkdir()
    SearchFolder(tmp_path / "empty", {})


@pytest.mark.parametrize("text", ["{}", "damaged", '{"arguments": {}, "study": "a", "more": 1}'])
def test_a_state_of_another_version_raises(tmp_path, text):
    (tmp_path / "search.json").write_text(text)
    with pytest.raises(InputError, match=r"Choose another folder with out=... \(`--out`\)\."):
        SearchFolder(tmp_path, {})


AGAIN = r"Repeat the search in another folder, or continue it with more time \(`--time`\)\.$"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "Give the folder that"),
        ("{}", rf"not written by this version of tersor\. {AGAIN}"),
        ("damaged", f"is damaged.* {AGAIN}"),
    ],
)
def test_an_unreadable_front_raises(tmp_path, text, message):
    if text is not None:
        (tmp_path / "front.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_front(tmp_path)


def test_files_are_added_to_the_folder_and_temporary_ones_removed(tmp_path):
    folder = SearchFolder(tmp_path / "out", {})
    with folder.held():
        assert folder.original_right is None
        folder.keep_original_right(np.array([True, False, True]))
        assert folder.original_right.tolist() == [True, False, True]
        for name in ("first", "second"):
            file = folder.point_file(name)
            file.write_text(name)
            folder.provide(file)
        assert (folder.path / MODEL).read_text() == "first", "there is a file already"
        assert folder.relative(file) == "points/second/model.onnx"
        folder.write_point(
            baseline("second", 90.0, 1.0, "int8").model_copy(update={"file": folder.relative(file)}), "r"
        )
        assert (file.parent / RECIPE).read_text() == "r"
        assert json.loads((file.parent / "numbers.json").read_text())["validation"] == 90.0
        (folder.path / RECIPE).write_text("of the model")
        folder.hand_over(baseline("missing", 90.0, 1.0, "int8"))
        assert (folder.path / MODEL).read_text() == "first", "a file that is gone is not copied"
        for name in ("kept", "other"):
            (folder.path / "trials" / name).mkdir()
        assert folder.untrained_file().parent.is_dir()
        folder.remove_trials(kept=["kept"])
        assert {each.name for each in (folder.path / "trials").iterdir()} == {"kept", "lock"}
        folder.remove_trials()
        assert {each.name for each in (folder.path / "trials").iterdir()} == {"lock"}


def test_the_bar_counts_seconds_and_saves_the_state_every_ten_seconds():
    time, kept, progress = FakeTime(), [], RecordedProgress()
    clock = Clock(1.0, used=3.0, now=time)
    bar = TimeBar(progress, clock)
    moved = []
    progress.advance = lambda items, **values: moved.append((items, values))
    bar.keep = lambda: kept.append(clock.used)
    bar.begin()
    bar.values = {"best": 90.0}
    for seconds in (0.5, 7.0, 1.0, 9.0, 100.0):
        time.work(seconds)
        bar.advance()
    # 3, 3.5, 10.5, 11.5, 20.5 and 120.5 seconds of 60
    assert moved == [(3, {}), (7, bar.values), (1, bar.values), (9, bar.values), (40, bar.values)]
    assert kept == [10.5, 120.5], "20.5 is not more than ten seconds later"


@pytest.fixture
def ranged(tmp_path, monkeypatch):
    """A search before its feasible range is measured, and the list of its calls."""
    search = searching(tmp_path / "out")
    measured, search.folder.state.baselines = search.folder.state.baselines, []
    search.points, search.original, search.best = [], None, None
    search.folder.state.costs.step = 0.0
    search.folder.state.costs.test = 6.0
    other = baseline("original-openvino", 90.0, 1.5, "float32").model_copy(update={"runtime": "openvino"})
    floats = baseline(surveys.FLOAT32, 90.0, 2.5, "float32")
    file = tmp_path / "out" / "baselines" / "original.onnx"
    log = []
    monkeypatch.setattr(FakeBench, "pace", lambda bench, *_: bench.time.work(10.0) or 0.5, raising=False)
    monkeypatch.setattr(
        FakeBench, "choosing_on_test_images", lambda bench: log.append("chosen") or bench, raising=False
    )
    search.bench.experiment.model = None
    monkeypatch.setattr(surveys, "_export_original", lambda _search: file)
    monkeypatch.setattr(surveys, "_integers", lambda _search: log.append("integers") or {})
    monkeypatch.setattr(surveys, "_integers_elsewhere", lambda _search: {})
    monkeypatch.setattr(surveys, "_measured", lambda *_: [*measured, other, floats])
    monkeypatch.setattr(
        end_costs, "multiply_peaks", lambda runtimes: search.bench.time.work(50.0) or log.append(runtimes)
    )
    monkeypatch.setattr(end_costs, "folded_layers", lambda _search: search.bench.time.work(7.0))
    monkeypatch.setattr(end_costs, "open_session", lambda *_: search.bench.time.work(2.0))
    monkeypatch.setattr(surveys, "replace", lambda bench, **changed: bench.__dict__.update(changed) or bench)
    return search, log


@pytest.mark.parametrize("seen", [True, False])
def test_the_feasible_range_is_measured_once_and_provides_the_costs(ranged, monkeypatch, seen):
    search, log = ranged
    monkeypatch.setattr(surveys, "_seen", lambda *_: log.append("seen") or seen)
    feasible_range(search)
    state = search.folder.state
    assert state.seen is seen
    peaks = ["onnxruntime", "openvino"]
    assert log == ["seen", *["chosen"] * seen, "integers", peaks]
    assert (state.costs.layers, state.costs.open) == (7.0, 3 * 2.0), "opened once, and for each of two batch sizes"
    assert state.costs.test == (3.0 if seen else 6.0), "half of the test images are left for tests"
    assert state.costs.runs == pytest.approx((2.0 + 256.0) / 1000)
    assert [point.name for point in search.points] == ["original", Candidate().name], "those of the target runtime"
    assert search.best.name == Candidate().name
    assert [record.point.name for record in search.study.records()] == [Candidate().name]
    assert state.costs.step == 0.5
    assert state.costs.attach == pytest.approx(10.0 - 3 * 0.5)
    assert search.bench.checkpoint_every == 60, "30 seconds"
    log.clear()
    feasible_range(search)
    assert log == [*["chosen"] * seen, peaks], "nothing but the peaks is measured again, by a new process"


@pytest.mark.parametrize(("step", "every"), [(0.01, 200), (40.0, 1)])
def test_the_checkpoint_interval_is_limited_in_both_directions(ranged, monkeypatch, step, every):
    search, _ = ranged
    monkeypatch.setattr(surveys, "_seen", lambda *_: False)
    search.folder.state.costs.step = step
    feasible_range(search)
    assert search.bench.checkpoint_every == every


def test_a_search_continues_if_the_original_cannot_be_trained(ranged, monkeypatch):
    def fails(*_):
        raise InputError("no gradient")

    search, _ = ranged
    monkeypatch.setattr(surveys, "_seen", lambda *_: False)
    monkeypatch.setattr(FakeBench, "pace", fails)
    monkeypatch.setattr(surveys, "measure_end", lambda *_: None)
    progress = search.bar._progress = RecordedProgress()
    feasible_range(search)
    assert search.folder.state.costs.step == 0
    assert progress.lines == ["warning: the original cannot be trained: no gradient"]


def test_the_feasible_range_is_described_in_words(tmp_path):
    search = searching(tmp_path / "out", minutes=20.0, budget=Budget(max_drop=0.1))
    search.bench.time.work(60.0)
    first, second, *lines = describe_range(search)
    images = len(search.bench.validation.images)
    error = 100 * (0.9 * 0.1 / images) ** 0.5
    assert first == f"validation: {images} images, on which one standard error of the accuracy is {error:.2f} points"
    assert second.startswith(
        f"warning: the allowed drop of 0.1 points is smaller than one standard error ({error:.2f}). Use more validation"
    )
    assert lines[1] == "  onnxruntime float32: 90.00 %, 2.00 ms at batch 1, 256 ms at batch 128, 0.200 MB"
    assert lines[2].startswith(
        "  onnxruntime int8: 89.80 %, 1.00 ms at batch 1, 128 ms at batch 128, 0.200 MB; it loses 0.20"
    )
    assert lines[3] == "budget: at most 0.1 points lost; goal: the fastest network within it"
    # reserve: 6 s of 1200, one and a half final measurements of 2 * 5 s, two points of 1 s; the survey gets 120 s
    reserve = 6.0 + 15.0 + 2.0
    left = 1200 - 60 - reserve
    assert lines[4] == (
        f"plan: 19.0 minutes left: 2.0 for measuring untrained candidates, {(left - 120) / 60:.1f} for training "
        "them, "
        f"{reserve / 60:.1f} for the final measurements; one training step of the original takes 0.1 s; "
        f"about {(left - 120) / 0.1:.0f} of them fit into the time for training"
    )
    search = searching(tmp_path / "other", budget=Budget(megabytes=0.5))
    lines = describe_range(search)
    assert lines[4] == "budget: 0.5 MB; goal: the most accurate network within it"
    assert not any(line.startswith("warning") for line in lines)


def test_a_busy_machine_causes_a_warning(tmp_path):
    search = searching(tmp_path / "out")
    baselines = search.folder.state.baselines
    for error, warns in ((0.15, False), (0.59, True)):
        baselines[1] = baselines[1].model_copy(update={"latency_error": {1: error, 128: 0.01}})
        lines = [line for line in describe_range(search) if line.startswith("warning: latencies are uncertain")]
        assert bool(lines) == warns
    assert "uncertain by up to 59 %, probably because other processes use the processor." in lines[0]


def test_images_with_a_much_better_metric_are_recognized_as_training_images_of_the_original(tmp_path):
    search = searching(tmp_path / "out")
    search.bench.test_metric = lambda *_: 80.0
    for metric, seen in ((80.0, False), (85.0, False), (85.2, True)):
        # two samples of 1000 images, 82.6 % of all right: one standard error of the difference is 1.70 points
        search.bench.measured = lambda *_, metric=metric: SimpleNamespace(metric=metric)
        assert surveys._seen(search, tmp_path) is seen


def test_the_space_contains_fewer_bits_only_if_the_size_is_limited(tmp_path):
    search = searching(tmp_path / "out", budget=Budget(megabytes=0.1))
    assert space_of(search, ["wide"], [24]) == Space(9, True, ["wide"], ("8", "mixed", "4"), [24])
    lines = []
    search.bench.broken, search.bar.tell = (Candidate().name,), lines.append
    assert space_of(search, ["wide"], []) == Space(0, False, ["wide"], ("8", "mixed", "4"), [])
    search = searching(tmp_path / "other")
    search.bench.broken, search.bar.tell = (Candidate().name,), lines.append
    assert space_of(search, [], []).bits == ("8",)
    kinds = [line.partition("so only ")[2].partition(" are tried: cannot be built")[0] for line in lines]
    assert kinds == ["students, image sizes and bits", "students and image sizes"]


@pytest.mark.usefixtures("fake_search")
def test_a_single_slow_candidate_does_not_determine_the_cost_of_the_survey(tmp_path):
    search = searching(tmp_path / "out")
    costs = search.folder.state.costs
    costs.survey = costs.export = 40.0  # including the imports of the first export
    surveys._try(search, Candidate(branches=2))
    assert (costs.survey, costs.export) == pytest.approx((5.0, 3.0)), "the first survey replaces the estimate"
    search.bench.time.slowness = 5.0
    surveys._try(search, Candidate(branches=1))
    assert costs.survey == pytest.approx((5.0 + 25.0) / 2)


@pytest.mark.usefixtures("fake_search")
def test_the_survey_stops_in_time_and_repeats_no_proposal(tmp_path):
    search = searching(tmp_path / "out", minutes=4.0)
    began = search.clock.used
    survey(search, Space(1, prunable=True, students=["wide"]))
    state = search.folder.state
    left = 240.0 - (1.2 + 15.0 + 2.0)
    assert state.survey_until == pytest.approx(began + 0.2 * left)
    assert state.costs.survey == pytest.approx(1.0 + 3.0 + 1.0), "build, export and time"
    assert state.survey_until - 2 * state.costs.survey < search.clock.used <= state.survey_until
    names = [record.of.name for record in search.study.records()]
    assert len(names) == len(set(names))
    assert len(names) == (search.clock.used - began) // 5.0
    assert "wide-8bit" in names
    assert "wide-8bit" not in {point.name for point in search.points}, "it is not trained yet"
    slow = searching(tmp_path / "slow", minutes=4.0)
    slow.folder.state.costs.survey = 80.0
    survey(slow, Space(1, prunable=True, students=["wide"]))
    assert len(slow.study.records()) > len([Candidate()]), "at least one candidate"
    few = searching(tmp_path / "few")
    survey(few, Space(1, prunable=False, students=[]))
    assert {record.of for record in few.study.records()} == {Candidate(branches=1), Candidate()}
    assert few.clock.used < few.folder.state.survey_until, "it ends early, because everything was tried"


@pytest.mark.usefixtures("fake_search")
def test_a_further_survey_tries_a_candidate_although_the_clock_advances_between_two_readings(tmp_path, monkeypatch):
    search = searching(tmp_path / "out")
    search.folder.state.costs.survey = 150.0  # more than the share of the time that is left
    time = search.bench.time

    def moving(fake):
        fake.seconds += 0.001
        return fake.seconds

    monkeypatch.setattr(type(time), "__call__", moving)
    before = len(search.study.records())
    assert rest_of_time._survey_more(search, Space(1, prunable=True, students=["wide"]))
    assert len(search.study.records()) > before


@pytest.mark.usefixtures("fake_search")
@pytest.mark.parametrize(("share", "tried"), [(0.4, True), (0.6, False)])
def test_the_first_candidate_can_use_half_of_the_reserve(tmp_path, share, tried):
    search = searching(tmp_path / "out", minutes=1.0)
    reserve = search.reserve(more=1)
    search.folder.state.costs.survey = seconds_to_train(search) + share * reserve
    assert search.reserve(more=1) == reserve
    space = Space(1, prunable=True, students=["wide"])
    assert rest_of_time._survey_more(search, space) == tried
    search.folder.state.costs.survey = seconds_to_train(search) + share * reserve
    assert not rest_of_time._survey_more(search, space), "only the first one"


@pytest.mark.usefixtures("fake_search")
def test_a_surveyed_candidate_that_is_the_best_so_far_is_reported(tmp_path):
    search = searching(tmp_path / "out", budget=Budget(latency_ms={1: 100.0}))
    lines = []
    search.bar.tell = lines.append
    surveys._try(search, Candidate(branches=1))
    assert not lines, "it lost more than the original"
    search = searching(tmp_path / "other", budget=Budget(max_drop=50))
    search.bar.tell = lines.append
    found = surveys._try(search, Candidate(branches=2))
    assert search.best == found.point
    assert lines == [
        f"best so far, {found.of}: {found.point.validation:.2f} % before training, {found.point.latencies}"
    ]
