"""Every candidate of a search is in its report: as a point of the front, or with the reason why it is not there."""

import pytest
from optuna.storages import InMemoryStorage

import search_fakes
from search_fakes import FakeBench, run, searching
from tersor.core.errors import InputError
from tersor.search import survey as surveys
from tersor.search.candidate import Candidate
from tersor.search.dropped import dropped
from tersor.search.space import Space
from tersor.search.study import Study
from tersor.search.verdict_line import test_use as use_of_test_images

pytestmark = pytest.mark.usefixtures("fake_search")


def test_every_trial_is_a_point_or_has_a_reason(tmp_path):
    search = searching(tmp_path / "out")
    search.bench.broken = (Candidate(branches=3).name,)
    made = run(search)
    on_the_front = {point.name for point in made.points}
    records = search.study.records()
    for record in records:
        kept = any(each.point.name in on_the_front for each in records if each.of == record.of)
        if kept and record.rung == 0 and record.of != Candidate():
            reason = made.dropped.get(record.point.name, "")
            assert (". After training, this network is the point" in reason) is (record.point.name not in on_the_front)
        elif record.of != Candidate():
            assert kept or record.of.name in made.dropped
    first = search.folder.state.rungs[0].members
    assert any(name not in first for name in made.dropped)
    assert made.dropped[Candidate(branches=3).name] == "Failed: cannot be built"
    slow = made.dropped["deep-8bit"]
    assert slow.startswith(
        "49.80 % before training, 2.00 ms at batch 1, 256 ms at batch 128. Not trained: it is slower, or hardly "
        "faster, than the fastest free baseline"
    )
    rung = [text for name, text in made.dropped.items() if name in first]
    assert rung
    once = [text for text in rung if "100 steps" in text]
    assert all("ms at batch 128. Not trained further after training round 1 of" in text for text in once)
    page = (search.folder.path / "report.html").read_text()
    assert all(f"<p>{name}: {reason}</p>" in page for name, reason in made.dropped.items())


def test_the_reason_for_a_dominated_candidate_names_the_better_point(tmp_path):
    search = searching(tmp_path / "out")
    made = run(search)
    dominated = {point.name for point in made.dominated}
    names = [name for name in made.dropped if name in dominated and "After training, this" not in made.dropped[name]]
    assert names
    points = {point.name for point in made.points}
    for name in names:
        better = made.dropped[name].rpartition("; ")[2].partition(" is at least as good")[0]
        assert better in points


def test_every_use_of_the_test_images_is_counted(tmp_path):
    search = searching(tmp_path / "out")
    made = run(search)
    (names,) = made.test_runs
    assert set(names) == {point.name for point in (*made.points, *made.dominated) if point.test is not None}
    start = "at the start, on the original, to check whether it was trained on the validation images"
    few = made.model_copy(update={"test_runs": [["a", "b"]]})
    assert use_of_test_images(few) == f"1000 test images were used twice: {start}; at the end, on a, b."
    assert use_of_test_images(made.model_copy(update={"test_runs": []})) == f"1000 test images were used once: {start}."
    shared = use_of_test_images(few.model_copy(update={"tests_chose": True}))
    assert (
        "at the end, on a, b. The validation images are the other half of the test set, because the original" in shared
    )
    search.folder.state.finished = True
    search.save()
    longer = searching(tmp_path / "out", minutes=20.0, time=search.bench.time, bench=search.bench)
    again = run(longer)
    assert again.test_runs[0] == names
    assert len(again.test_runs) == 2
    assert not set(names) & set(again.test_runs[1]), "no point runs on the test images twice"
    text = use_of_test_images(again.model_copy(update={"test_runs": [["a"], 9 * ["b"]]}))
    ends = "at the end, on a; at the end of the continued search, on 9 points"
    assert text == f"1000 test images were used 3 times: {start}; {ends}."
    assert "were used once" not in (search.folder.path / "report.html").read_text()


def test_lossless_candidates_are_not_reported_as_lacking_time(tmp_path, monkeypatch):
    monkeypatch.setattr(search_fakes, "metric", lambda _candidate, _seconds: 95.0)
    search = searching(tmp_path / "out")
    made = run(search)
    assert not search.folder.state.rungs
    assert made.dropped
    assert all("Not trained: its metric has not dropped" in reason for reason in made.dropped.values())


def test_a_candidate_on_the_front_is_not_dropped_if_its_further_training_fails(tmp_path, monkeypatch):
    train = FakeBench.train

    def fails_later(bench, candidate, trained, seconds):
        if len(trained) > 1:
            raise InputError("diverged")
        return train(bench, candidate, trained, seconds)

    monkeypatch.setattr(FakeBench, "train", fails_later)
    search = searching(tmp_path / "out")
    made = run(search)
    names = {point.name for point in made.points}
    kept = {each.of.name for each in search.study.records() if each.point.name in names}
    assert kept & set(made.failed)
    assert not any(made.dropped[name].startswith("Failed") for name in kept & set(made.dropped))


def test_candidates_named_by_the_user_are_tried_first_or_listed_as_untried(tmp_path, monkeypatch):
    named = [Candidate("wide"), Candidate("deep"), Candidate(pixels=24)]
    monkeypatch.setitem(search_fakes.FakeLatency.of, named[2].name, 0.5)
    search, lines = searching(tmp_path / "out"), []
    search.bench.example, search.bar.tell = lambda _candidate: None, lines.append
    search.named, search.bench.broken = named, ("deep-8bit",)
    surveys.survey(search, Space(9, prunable=True, students=["wide", "deep"]))
    assert [what[1] for what in search.bench.log if what[0] == "build"][:3] == [each.name for each in named]
    assert lines[0] == "wide, 8 bits: 49.80 % before training, 0.300 ms at batch 1, 38.4 ms at batch 128"
    assert lines[1] == "deep, 8 bits failed: cannot be built"
    short = searching(tmp_path / "short", minutes=0.2)
    short.named, short.bench.example = named, search.bench.example
    surveys.survey(short, Space(9, prunable=True, students=["wide", "deep"]))
    assert short.untried, "there is no time for all three"
    reasons = [dropped(short, [])[each.name] for each in short.untried]
    assert reasons == ["24 pixels: not tried, because there was no time for it"]


def test_a_student_is_reported_under_the_name_given_by_the_user(tmp_path):
    search = searching(tmp_path / "out")
    student = Candidate("net.py:small")
    search_fakes.FakeLatency.of[student.name] = 3.0
    search.bench.students["net.py:small"] = None
    search.study = Study(InMemoryStorage(), "own", ["original", "net.py:small"], 0)
    surveys._try(search, student)
    assert dropped(search, [])[student.name].startswith(
        "net.py:small: 49.80 % before training, 3.00 ms at batch 1, 384 ms at batch 128. Not trained"
    )


def test_every_reason_is_a_complete_sentence(tmp_path):
    search = searching(tmp_path / "out")
    run(search)
    reasons = dropped(search, [])
    (last,) = search.folder.state.rungs[-1].members
    better = "another point was at least as good in metric, latency and size."
    assert reasons[last].endswith(f"ms at batch 128. Before latencies were measured again at the end, {better}")
    assert not any(reason.endswith(". .") for reason in reasons.values())
