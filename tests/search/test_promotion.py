"""The choice of candidates to train, with values computed by hand; advice and speedup at the end."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from search_fakes import SPACE, baseline, latencies, searching
from tersor.evaluation.timings import Ratio
from tersor.search import finish, halving, rest_of_time, rung_training
from tersor.search.candidate import Candidate
from tersor.search.compression_budget import Budget
from tersor.search.halving import halve
from tersor.search.learning_curves import expected
from tersor.search.promotion import entrants, hopeful, improvement, promoted, why_not_continued
from tersor.search.rest_of_time import train_and_survey
from tersor.search.rung_training import seconds_to_train
from tersor.search.state import Rung
from tersor.search.study import Record

ROOT = math.sqrt(128)
"""Latencies in the fakes are proportional to the batch size, so the geometric mean of 1 and 128 is this multiple."""


def add(search, candidate, rung, validation, milliseconds, **changed):
    point = baseline(candidate.name if not rung else f"{candidate.name}-{rung}", validation, milliseconds, "int8")
    point = point.model_copy(update={"free": False, "description": str(candidate), **changed})
    made = Record(candidate=candidate.parameters, rung=rung, point=point)
    search.study.add(made)
    return made


def test_entrants_cover_the_latencies_and_one_third_are_students(tmp_path):
    search = searching(tmp_path / "out")
    pruned = [add(search, Candidate(branches=n), 0, 89.0 - 2 * n, 0.84 - 0.1 * n) for n in range(1, 7)]
    add(search, Candidate(branches=7), 0, 89.0, 0.86)  # not much faster than the 8-bit original
    add(search, Candidate(branches=8), 0, 76.0, 0.5)  # dominated
    students = [add(search, Candidate("wide", pixels=size), 0, 10.0, size / 100) for size in (60, 40, 20)]
    chosen = entrants(search, 6)
    # two of three students; four of six others in the order of their latency: 0.75, 2.25, 3.75 and 5.25
    assert chosen[:2] == [students[2], students[0]]
    ordered = sorted(pruned, key=lambda each: each.point.mean_ms)
    assert chosen[2:] == [ordered[place] for place in (0, 2, 3, 5)]
    (one,) = entrants(search, 1)
    assert one == ordered[3], "a single one is a change of the original"
    assert not entrants(search, 0)


def test_changes_that_lost_most_of_the_metric_are_skipped_if_there_are_others(tmp_path):
    search = searching(tmp_path / "out")
    lost = add(search, Candidate(branches=5), 0, 0.4 * 90 - 0.1, 0.2)
    assert entrants(search, 6) == [lost]
    kept = add(search, Candidate(branches=4), 0, 0.4 * 90, 0.3)
    assert entrants(search, 6) == [kept]


def test_the_8_bit_original_is_trained_if_no_candidate_is_faster(tmp_path):
    search = searching(tmp_path / "out")
    original = add(search, Candidate(), 0, 89.8, 1.0)
    add(search, Candidate(branches=1), 0, 89.0, 0.98)
    assert entrants(search, 6) == [original]
    equally_fast = add(search, Candidate(branches=3), 0, 89.0, 1.0, bytes=50_000)
    search.best = equally_fast.point
    assert entrants(search, 6) == [equally_fast], "the best so far: it is smaller"
    little = add(search, Candidate(branches=2), 0, 88.0, 0.96)
    assert entrants(search, 6) == [little], "a little faster is better than nothing"


def test_lossless_candidates_are_not_trained(tmp_path):
    search = searching(tmp_path / "out")
    lossless = add(search, Candidate(branches=1), 0, 90.0, 0.6)
    assert not entrants(search, 6)
    lost = add(search, Candidate(branches=2), 0, 89.9, 0.5)
    assert entrants(search, 6) == [lost]
    trained = [add(search, each.of, 1, each.point.validation, 0.5) for each in (lossless, lost)]
    assert promoted(search, trained, 2, 10.0) == promoted(search, trained, 1, 10.0) == trained[1:]
    assert promoted(search, trained[:1], 1, 10.0) == []
    assert why_not_continued(search, trained[0]).startswith("its metric has not dropped")
    unlikely = ", or it was not expected to end within the allowed drop"
    assert why_not_continued(search, trained[1]) == f"others were expected to gain more{unlikely}"
    search.points = [search.original, trained[0].point]
    assert finish.advice(search, search.original) == [], "more time does not help"


def test_an_extension_trains_another_candidate_if_the_last_one_cannot_be_improved(tmp_path):
    search = searching(tmp_path / "out")
    lossless = add(search, Candidate(branches=1), 0, 89.0, 0.6)
    add(search, lossless.of, 1, 90.0, 0.6)
    lost = add(search, Candidate(branches=2), 0, 85.0, 0.5)
    state = search.folder.state
    state.rungs, state.extended = [Rung(members={lossless.of.name: 1})], True
    assert halving._rung(search, 2, 1).members == {lost.of.name: 1}
    state.extended = False
    assert halving._rung(search, 2, 1).members == {lost.of.name: 1}, "as after a survey that went on"
    search.study.fail(lost.of, 1, "NaN")
    for state.extended in (False, True):
        assert halving._rung(search, 2, 1).members == {}, "what failed is not trained again"


def hopeless_student(path):
    """A search with 100 s left, a student with a drop of 60 points after 30 s, and a change with a drop of 1.5."""
    search = searching(path)
    student = add(search, Candidate("wide"), 1, 30.0, 0.3, seconds=30.0)
    change = add(search, Candidate(branches=1), 1, 88.5, 0.6, seconds=30.0)
    search.folder.state.rungs = [Rung(members={each.of.name: 1 for each in (student, change)}, until=0.0)]
    for _ in range(2):  # the reserve depends on the total
        search.clock.total = search.clock.used + 100 + search.reserve(more=1)
    return search, student, change


def test_a_candidate_expected_to_end_far_below_the_limit_is_not_trained_again(tmp_path):
    search, student, change = hopeless_student(tmp_path / "out")
    # 30 + 100 s: 60 * (130 / 30)^-0.6 = 24.9 points lost, with an error of a fifth of the gain
    assert expected(search, student, 130.0) == pytest.approx(65.1, abs=0.1)
    assert hopeful(search, [student, change], 100.0) == [change]
    assert halving._rung(search, 2, 1).members == {change.of.name: 2}
    assert promoted(search, [student, change], 2, 100.0) == [change, student], "but for this, the best student stays"
    assert hopeful(search, [student, change], 10_000.0) == [student, change], "more time gives it a chance"
    search = searching(tmp_path / "other", budget=Budget(latency_ms={1: 1.0}))
    assert hopeful(search, [student, change], 100.0) == [student, change], "there is no drop to end within"


def test_without_promising_candidates_others_are_trained_then_surveyed_then_the_nearest_is_trained(tmp_path):
    search, student, change = hopeless_student(tmp_path / "out")
    search.folder.state.rungs[0].members.pop(change.of.name)
    for surveyed in (student.of, Candidate()):
        add(search, surveyed, 0, 20.0, 0.9)
    assert halving._rung(search, 2, 1, last_resort=False).members == {}, "the time is left for the survey"
    assert halving._rung(search, 2, 1).members == {student.of.name: 2}
    others = [add(search, Candidate(branches=count), 0, 80.0 + count, 0.9 - count / 10) for count in (2, 3, 4)]
    failed = add(search, Candidate(branches=5), 0, 86.0, 0.4)
    search.study.fail(failed.of, 1, "diverged")
    rung = halving._rung(search, 2, 1)
    assert set(rung.members.items()) <= {(each.of.name, 1) for each in others}
    assert rung.members
    used = rung.until - search.clock.used
    assert used == pytest.approx(0.35 * seconds_to_train(search)), "as much as a first rung, and not all"


def test_the_survey_continues_before_unpromising_candidates_are_trained_again(tmp_path, monkeypatch):
    order, found = [], iter([True, False])
    monkeypatch.setattr(rest_of_time, "_survey_more", lambda *_: order.append("survey") or next(found))
    train_and_survey(searching(tmp_path / "out"), SPACE, order.append)
    assert order == [False, "survey", True, "survey", True]


def test_to_maximize_the_metric_a_candidate_is_trained_up_to_the_maximum(tmp_path):
    search = searching(tmp_path / "out", budget=Budget(latency_ms={1: 1.0}))
    better = add(search, Candidate(branches=1), 0, 99.9, 0.6)
    add(search, Candidate(branches=2), 0, 100.0, 0.5)
    assert entrants(search, 6) == [better]


def test_a_search_without_an_improvable_candidate_ends_with_a_message(tmp_path, monkeypatch):
    search = searching(tmp_path / "out")
    lines = []
    search.bar.tell = lines.append
    add(search, Candidate(branches=1), 0, 90.0, 0.6)
    monkeypatch.setattr(rest_of_time, "survey", lambda *_: None)
    train_and_survey(search, SPACE, lambda _last: halve(search))
    assert not search.folder.state.rungs
    assert len(lines) == 1
    assert lines[0].startswith("training ends: no promising candidate can be improved by training. 10.0 of 10 minutes")
    assert lines[0].endswith(" of them reserved for the final measurements.")
    assert finish.advice(search, search.original) == []
    lines.clear()
    add(search, Candidate(branches=2), 0, 80.0, 0.5)
    search.folder.state.costs.step = 100.0
    train_and_survey(search, SPACE, lambda _last: halve(search))
    assert lines[0].startswith("training ends: training a candidate takes at least 33.4 minutes. "), (
        "no time for twenty steps"
    )


def test_with_a_limit_on_the_size_fewer_bits_enter_and_larger_files_do_not(tmp_path):
    search = searching(tmp_path / "out", budget=Budget(megabytes=0.1))
    add(search, Candidate(branches=3), 0, 89.0, 0.5, bytes=100_001)
    small = add(search, Candidate(bits="4"), 0, 80.0, 1.0, bytes=90_000)
    assert entrants(search, 6) == [small]


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_expected_improvement_matches_values_computed_by_hand(tmp_path, power):
    search = searching(tmp_path / "out")
    made = add(search, Candidate(branches=3), 1, 88.0, 0.5, drop_error=0.3, seconds=10.0)
    # 16 times the time: the drop falls from 2 to 0.5, and a point is allowed; the error 0.3 of the images and that of
    # the exponent, 0.15, are independent
    of_exponent = 0.15 * math.log(16) * (1 - 0.5) / math.log(1 / 0.5)
    probability = NormalDist(0, math.hypot(0.3, of_exponent)).cdf(0.5)
    assert improvement(search, made, 160.0, power) == pytest.approx(math.log(1.0 / 0.5) * probability**power)
    slow = add(search, Candidate(branches=1), 1, 88.0, 1.1)
    assert improvement(search, slow, 160.0, power) == 0
    search.points = [search.original.model_copy(update={"validation": 50.0, "name": "lost"})]
    gain = math.log(2.0 / 0.5)  # no point meets the budget: relative to the slowest point
    assert improvement(search, made, 160.0, power) == pytest.approx(gain * probability**power)


def test_the_line_about_a_training_contains_the_errors_of_drop_and_latencies(tmp_path):
    search = searching(tmp_path / "out")
    made = add(search, Candidate(branches=3), 1, 88.0, 0.5, drop_error=0.3, latency_error={1: 0.03, 128: 0.02})
    assert rung_training._described(search, made) == (
        "original-branches3-8bit-1: 88.00 % (-2.00, standard error 0.30), 0.500 ± 0.015 ms at batch 1, 64.0 ± 1.3 ms "
        "at batch 128"
    )
    search.budget = Budget(latency_ms={1: 0.1})
    search.points = [made.point]
    assert finish.advice(search, made.point)[0].endswith(
        "takes 0.500 ± 0.015 ms: original, 3 branches removed, 8 bits."
    )


def test_advice_for_a_trained_network_that_lost_too_much(tmp_path):
    search = searching(tmp_path / "out", minutes=10.0, budget=Budget(max_drop=0.5, latency_ms={1: 1.5}))
    other = baseline("original-openvino", 90.0, 1.5, "float32").model_copy(update={"runtime": "openvino"})
    search.folder.state.baselines.append(other)
    first = add(search, Candidate(branches=3), 1, 88.0, 0.5, seconds=40.0)
    worse = add(search, Candidate(branches=5), 1, 85.0, 0.3, seconds=50.0)
    search.points = [search.original, first.point, worse.point]
    after = 90 - expected(search, first, 150.0)
    assert 0 < after < 2
    error = math.hypot(first.point.drop_error, 0.15 * math.log(150 / 40) * after)
    assert finish.advice(search, first.point) == [
        (
            f"More time: with a total time of 30 minutes, the same network is expected to lose about {after:.2f} "
            f"points (standard error {error:.2f}) instead of 2.00. This is still more than allowed."
        ),
        (
            f"Larger drop: one network ({first.point.description}) loses 2.00 points and meets the other limits. To "
            "choose it, use `tersor pick` with max_drop: 2 (`--max-drop`)."
        ),
        (
            "Another runtime: in openvino, original-openvino takes 0.75 times as long as the original in onnxruntime. "
            "To compress for it, search in another folder with runtime: openvino (`--runtime`)."
        ),
    ]
    # the original does not meet the latency; the candidate with the best prospects is named
    lines = finish.advice(search, search.original)
    assert lines[0].startswith(
        f"More time: with a total time of 30 minutes, one network ({first.point.description}) is expected to lose about"
    )
    assert lines[1].startswith("Larger drop: ")
    add(search, Candidate(branches=9), 1, 40.0, 0.01, seconds=2.0)
    near = f"one network ({first.point.description}) is expected"
    assert near in finish.advice(search, search.original)[0], "not a faster one that is far away"
    worse = first.point.model_copy(update={"validation": 87.4})
    search.points = [search.original, worse]
    assert not any("Larger drop" in line for line in finish.advice(search, search.original)), "over 5 times 0.5 points"
    slow = first.point.model_copy(update={"latency_ms": {1: 3.0, 128: 384.0}})
    search.points = [search.original, slow]
    assert not any("Larger drop" in line for line in finish.advice(search, search.original)), "it is slower"


def test_advice_without_any_training_and_without_a_limit_that_helps(tmp_path):
    search = searching(tmp_path / "out", budget=Budget(megabytes=0.1))
    out_of_reach = "Size: no network reached 0.1 MB; the smallest has 0.200 MB: original."
    untrained = "More time: no candidate has been trained. If report.html lists failures, correct them."
    continued = f"{untrained} Otherwise continue the search, with a total time of at least 11 minutes."
    assert finish.advice(search, search.original) == [out_of_reach, continued]
    search.folder.state.costs.attach = 600.0
    assert "at least 41 minutes" in finish.advice(search, search.original)[1], "twice the time of the shortest training"
    small = add(search, Candidate(branches=3), 1, 80.0, 0.5, seconds=40.0).point
    search.points = [search.original, small.model_copy(update={"bytes": 150_000})]
    (out_of_reach,) = finish.advice(search, search.original)
    assert out_of_reach == f"Size: no network reached 0.1 MB; the smallest has 0.150 MB: {small.description}."
    search.points = [search.original.model_copy(update={"bytes": 100_000})]
    assert finish.advice(search, search.points[0]) == []


def test_advice_if_every_limit_is_met_but_not_all_at_once(tmp_path):
    limits = {1: 0.6, 128: 70.0}
    search = searching(tmp_path / "out", budget=Budget(latency_ms=limits, megabytes=0.1))
    point = add(search, Candidate(branches=3), 1, 80.0, 0.5, seconds=40.0).point
    small = point.model_copy(update={"latency_ms": {1: 0.7, 128: 80.0}, "bytes": 100_000})
    fast = point.model_copy(update={"latency_ms": {1: 0.6, 128: 80.0}, "bytes": 150_000})
    search.points = [small, fast, point.model_copy(update={"latency_ms": {1: 0.7, 128: 70.0}, "bytes": 150_000})]
    (several,) = finish.advice(search, small)
    assert several.startswith("No measured network meets all limits at once, and raising a single limit would not be")
    search.points.append(point.model_copy(update={"latency_ms": limits, "bytes": 150_000}))
    assert finish.advice(search, small)[0].endswith(
        f"a single limit: one network ({small.description}) meets all others, but it is 0.150 MB, 1.50 times the limit."
    )


def test_the_speedup_is_measured_against_the_fastest_baseline_of_each_batch_size(tmp_path, monkeypatch):
    search = searching(tmp_path / "out", minutes=1.0)
    search.folder.state.baselines.append(
        baseline("slow", 90.0, 3.0, "int8").model_copy(update={"latency_ms": {1: 0.9, 128: 999.0}})
    )
    search.folder.state.costs.layers = 7.0
    search.bench.example = lambda candidate: np.zeros((1, 3, 8 if candidate.pixels is None else 4, 8))
    best = add(search, Candidate(branches=3), 1, 89.0, 0.5).point
    given = {}

    class FakeTimings:
        def fastest(self, names, size):
            assert set(names) == {"slow", Candidate().name}
            return {1: "slow", 128: Candidate().name}[size]

        def ratio(self, baseline_name, name, size):
            assert name == best.name
            value = {"slow": 2.0, Candidate().name: 3.0}[baseline_name]
            return Ratio(value, value - 0.1, value + 0.1, 50, 5)

    def measure(openers, image, sizes, *, ratios, seconds):
        given.update(openers=set(openers), seconds=seconds)
        assert [each.value for each in ratios(FakeTimings(), 1)] == [2.0]
        return FakeTimings()

    monkeypatch.setattr(finish, "measure_latency", measure)
    found = finish._speedup(search, best)
    assert {size: each.value for size, each in found.items()} == {1: 2.0, 128: 3.0}
    assert given["openers"] == {best.name, "slow", Candidate().name}
    least = 0.03 * 60 / 2
    assert given["seconds"] == pytest.approx((60.0 - search.evidence_seconds) / 2 - least), (
        "half of the time that is left, for each batch size, without that of a further measurement"
    )
    for clock_left, seconds in ((1e4, 30.0), (-50.0, least)):
        monkeypatch.setattr(type(search.clock), "left", clock_left)
        finish._speedup(search, best)
        assert given["seconds"] == seconds
    assert finish._speedup(search, search.original) == {}
    assert finish._speedup(search, best.model_copy(update={"runtime": "openvino"})) == {}
    smaller = add(search, Candidate(branches=3, pixels=4), 1, 89.0, 0.5).point
    assert finish._speedup(search, smaller) == {}, "other images cannot be compared"


def test_the_front_contains_the_measured_values(tmp_path, monkeypatch):
    latencies([Candidate()])
    search = searching(tmp_path / "out", minutes=10.0, budget=Budget(max_drop=0.15))
    search.bench.experiment.data.test = range(25)
    search.bench.time.work(90.0)
    search.folder.state.baselines.append(baseline("elsewhere", 90.0, 0.1, "int8"))
    dominated = add(search, Candidate(branches=3), 1, 80.0, 1.5).point
    search.points = [*(each.model_copy(update={"test": 70.0}) for each in search.points), dominated]
    monkeypatch.setattr(finish, "_speedup", lambda *_: pytest.fail("only at the end"))
    made = finish.write_front(search, finished=False)
    assert (made.minutes, made.minutes_used) == (10.0, 1.5)
    assert (made.validation_images, made.test_images) == (1000, 25)
    assert made.validation_error == pytest.approx(100 * math.sqrt(0.9 * 0.1 / 1000))
    assert [point.name for point in made.points] == [Candidate().name, "original"]
    assert [point.name for point in made.dominated] == [dominated.name]
    assert [(point.name, point.test) for point in made.baselines] == [
        ("original", 70.0), (Candidate().name, 70.0), ("elsewhere", None)
    ]  # fmt: skip
    assert (made.best, made.met, made.shortfall, made.speedup, made.original) == ("original", True, "", {}, "original")
    assert made.advice == []
    assert made.limits == {"max_drop": 0.15, "latency_ms": {}, "megabytes": None}
    monkeypatch.setattr(finish, "_speedup", lambda *_: {})
    assert finish.write_front(search, finished=True).advice, "nothing was gained"
