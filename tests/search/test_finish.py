"""The end of a search: the final measurement, the verdict, and advice for limits that cannot be reached."""

import math

import pytest
from front_samples import front_of

from search_fakes import run, searching
from tersor.search import finish
from tersor.search.compression_budget import Budget
from tersor.search.finish import write_front
from tersor.search.front import BaselineSpeedup, Point, pick
from tersor.search.front_page import write_front_page
from tersor.search.verdict_line import last_line, verdict_lines

SIZES = (1, 128)
ROOMY = Budget(max_drop=2.0)
"""A budget that a trained candidate meets with any candidates of Optuna's sampler: versions 4.5 and 5.0 differ."""


def timed_as(values):
    """A fake final measurement of the speedup over the 8-bit original, and the list of the points that it timed."""
    names = []

    def speedup(search, best):
        names.append(best.name)
        if best.free:
            return {}
        value = values(best)
        ratio = {"value": value, "low": 0.9 * value, "high": 1.1 * value, "n": 9, "groups": 3}
        return {size: BaselineSpeedup(baseline="original-8bit", **ratio) for size in SIZES}

    return speedup, names


@pytest.mark.usefixtures("fake_search")
def test_the_table_contains_the_latency_of_the_final_measurement(tmp_path, monkeypatch):
    speedup, names = timed_as(lambda point: 1.2 / point.latency_ms[1])
    search = searching(tmp_path / "out", budget=ROOMY)
    search.folder.state.baselines = [
        each.model_copy(update={"latency_error": {1: 0.2, 128: 0.0}} if each.name == "original-8bit" else {})
        for each in search.folder.state.baselines
    ]
    monkeypatch.setattr(finish, "_speedup", speedup)
    made = run(search)
    best, baseline = made.point(made.best), made.point("original-8bit")
    alone = math.log(1.1 / 0.9) / 2
    assert best.latency_error == pytest.approx({1: math.hypot(alone, 0.2), 128: alone}, abs=1e-4), (
        "that of the baseline too"
    )
    assert names == [best.name]
    assert not best.free
    for size in SIZES:
        assert baseline.latency_ms[size] / best.latency_ms[size] == pytest.approx(made.speedup[size].value)
    assert best in made.points
    beside = (search.folder.path / best.file).parent / "numbers.json"
    assert Point.model_validate_json(beside.read_text()) == best, "as in front.json"


@pytest.mark.usefixtures("fake_search")
def test_a_more_precise_earlier_latency_is_kept(tmp_path, monkeypatch):
    search = searching(tmp_path / "out", budget=ROOMY)
    run(search)
    precise = {"latency_error": dict.fromkeys(SIZES, 0.001)}
    search.points = [each.model_copy(update=precise) for each in search.points]
    before = {each.name: each.latency_ms for each in search.points}
    monkeypatch.setattr(finish, "_speedup", timed_as(lambda _point: 3.0)[0])
    again = write_front(search, finished=True)
    assert not again.point(again.best).free
    assert again.point(again.best).latency_ms == before[again.best]


@pytest.mark.usefixtures("fake_search")
def test_a_point_that_turns_out_slower_than_another_is_not_chosen(tmp_path, monkeypatch):
    search = searching(tmp_path / "out", budget=ROOMY)
    made = run(search)
    first = made.best
    speedup, names = timed_as(lambda point: 0.01 if point.name == first else 1 / point.latency_ms[1])
    monkeypatch.setattr(finish, "_speedup", speedup)
    again = write_front(search, finished=True)
    assert names[0] == first
    assert again.best == names[-1] != first
    assert pick(again.points, search.budget, search.reference).name == again.best
    out = search.folder.path
    assert (out / "model.onnx").read_text() == (out / again.point(again.best).file).read_text()


@pytest.mark.usefixtures("fake_search")
def test_the_advice_names_limits_that_no_network_reached(tmp_path):
    search = searching(tmp_path / "out", minutes=0.1, budget=Budget(latency_ms={1: 1e-6, 128: 1e6}, megabytes=1e-6))
    advice = "\n".join(run(search).advice)
    assert "Latency: no network reached 1e-06 ms at batch 1; the fastest takes " in advice
    assert "Size: no network reached 1e-06 MB; the smallest has " in advice
    assert "batch 128" not in advice


def test_the_headline_names_the_baseline_and_contains_intervals():
    made = front_of(3)
    headline = verdict_lines(made)[0]
    assert headline.startswith(
        "original, 9 branches removed, 8 bits: 1.7x faster (1.6 to 1.8) at batch 1 and 1.7x faster (1.6 to 1.8) at "
        "batch 128 compared with original-8bit (OpenVINO, int8), the fastest baseline that needs no search; "
    )


def test_the_headline_states_the_change_of_the_size():
    made = front_of(3)
    best, original = made.point(made.best), made.point(made.original)
    for share, size in (
        (0.5, "; 2.0 times smaller than the original; "),
        (1.3, "; 1.3 times larger than the original; "),
        (1.02, "; same size as the original; "),
    ):
        found = best.model_copy(update={"bytes": int(share * original.bytes)})
        points = [found if each.name == best.name else each for each in made.points]
        assert size in verdict_lines(made.model_copy(update={"points": points}))[0]


def test_the_verdict_states_the_value_for_every_limit_and_the_reason_for_the_choice():
    limits = {"max_drop": 1.0, "latency_ms": {"1": 0.9}, "megabytes": 0.5}
    lines = verdict_lines(front_of(3).model_copy(update={"limits": limits}))
    assert lines[1:3] == [
        (
            "Meets the budget: 0.60 points lost on the validation images (1 allowed), 0.600 ms at batch 1 (limit "
            "0.9 ms), 0.120 MB (limit 0.5 MB)."
        ),
        (
            "Chosen because, of the networks within the budget, it has the lowest latency at batch 1 and 128 "
            "(geometric mean)."
        ),
    ]
    limits["max_drop"] = None
    lines = verdict_lines(front_of(3).model_copy(update={"limits": limits}))
    assert "best metric on the validation images within the budget" in lines[2]
    missed = {"met": False, "shortfall": "it takes 0.6 ms at batch 1, 2.00 times the limit"}
    lines = verdict_lines(front_of(3).model_copy(update=missed))
    assert lines[1].startswith("This network does not meet the budget")
    assert lines[2] == "Chosen because it is closest to the budget."


@pytest.mark.parametrize(("drop", "warned"), [(0.5, True), (0.7, False), (None, False)])
def test_a_drop_on_the_test_images_above_the_limit_causes_a_warning(drop, warned):
    made = front_of(3)
    limits = {"max_drop": drop, "latency_ms": {"1": 0.9}, "megabytes": None}
    best = made.point("best").model_copy(update={"test_drop_error": 0.25})
    made = made.model_copy(update={"limits": limits, "points": [best, *made.points[1:]]})
    assert made.point("best").test_drop_error == 0.25
    (line,) = [line for line in verdict_lines(made) if line.startswith("On the 10000 test images")]
    warning = " Warning: this is more than the allowed drop, which was met on the validation images."
    assert line == "On the 10000 test images: -0.60 points, with a standard error of 0.25." + warning * warned


def test_the_speedup_over_the_original_includes_the_errors_of_the_latencies():
    made = front_of(3)
    best = made.point("best").model_copy(update={"latency_error": {1: 0.05, 128: 0.5}})
    lines = verdict_lines(made.model_copy(update={"points": [best, *made.points[1:]]}))
    (line,) = [line for line in lines if line.startswith("Compared with")]
    assert line == (
        "Compared with original (OpenVINO, bfloat16): 3.3x faster (3.2 to 3.5) at batch 1 and 3.3x faster (2.0 to 5.5) "
        "at batch 128."
    )


def test_a_search_without_measured_networks_is_not_reported_as_finding_no_faster_one(tmp_path):
    made = front_of(3).model_copy(update={"best": "original-8bit", "speedup": {}})
    assert "No faster network was found within the budget among " in verdict_lines(made)[0]
    latency = made.model_copy(update={"limits": {"max_drop": None, "latency_ms": {"1": 9.0}, "megabytes": None}})
    assert "No more accurate network was found within the budget among " in verdict_lines(latency)[0]
    alone = made.model_copy(update={"points": [made.point("original-8bit")], "dominated": []})
    assert "No other network was measured in the given time." in verdict_lines(alone)[0]
    point = made.point("original-8bit").model_copy(update={"free": False, "description": "a, 8 bits"})
    trained = [point.model_copy(update={"name": f"a-{steps}steps", "steps": steps}) for steps in (0, 50, 90)]
    other = point.model_copy(update={"name": "b", "description": "b, 8 bits"})
    twice = alone.model_copy(update={"dominated": [*trained, other]})
    assert "within the budget among 2 measured networks, 1 of them trained." in verdict_lines(twice)[0]
    last = last_line(alone, tmp_path)
    assert "; a baseline that needs no search, chosen because no other network was measured in the given time. " in last


def test_the_last_line_contains_the_network_its_metric_its_speedup_and_its_files(tmp_path):
    made = front_of(3)
    files = f"Use {tmp_path / 'model.onnx'}; report.html and all networks (points/ and baselines/) are in {tmp_path}."
    assert last_line(made, tmp_path) == (
        "best: accuracy 93.00 %, -0.60 points on the test images; 1.7x faster (1.6 to 1.8) at batch 1 and 1.7x faster "
        "(1.6 to 1.8) at batch 128 compared with original-8bit (OpenVINO, int8), the fastest baseline that needs no "
        "search. " + files
    )
    unmeasured = last_line(made.model_copy(update={"speedup": {}}), tmp_path)
    assert "; the speedup was not measured. " in unmeasured
    free = last_line(made.model_copy(update={"best": "original-8bit", "speedup": {}}), tmp_path)
    assert free.startswith(
        "original-8bit: accuracy 93.40 %, -0.20 points on the test images; a baseline that needs no search, chosen "
        "because no faster"
    )
    limits = {"limits": {"max_drop": 0.5, "latency_ms": {}, "megabytes": None}}
    assert "Warning: the drop on the test images is more than allowed. Use " in last_line(
        made.model_copy(update=limits), tmp_path
    )
    missed = {"met": False, "shortfall": "it is 0.262 MB, 262.00 times the limit"}
    closest = made.model_copy(update={"best": "original-8bit", "speedup": {}, **missed})
    assert last_line(closest, tmp_path) == (
        "original-8bit: accuracy 93.40 %, -0.20 points on the test images; the budget is not met: it is 0.262 MB, "
        f"262.00 times the limit. {tmp_path / 'model.onnx'} is the closest network that was found; "
        + files.partition("; ")[2]
    )
    assert verdict_lines(closest)[0].endswith("smaller than the original. No network meets the budget.")


def with_another_runtime(made, milliseconds, **changed):
    """The sample with other latencies of the original in ONNX Runtime, while OpenVINO is the target runtime."""
    elsewhere = {"latency_ms": dict(zip(SIZES, milliseconds, strict=True)), "bytes": 10**5} | changed
    baselines = [each.model_copy(update=elsewhere if each.runtime == "onnxruntime" else {}) for each in made.baselines]
    return made.model_copy(update={"baselines": baselines})


@pytest.mark.parametrize("best", ["best", "original-8bit"])
def test_a_faster_file_in_another_runtime_is_mentioned_in_the_verdict_and_the_last_line(tmp_path, best):
    made = front_of(3).model_copy(update={"best": best, "limits": {"max_drop": 1, "latency_ms": {}, "megabytes": None}})
    error = dict.fromkeys(SIZES, 0.02)
    found = with_another_runtime(made, (0.5, 60.0), latency_error=error)
    sentence = (
        " Original-onnxruntime (ONNX Runtime, float32) is faster and needs no search: 0.500 ± 0.010 ms at batch 1"
    )
    if best != "best":  # whose batch of 128 takes 47 ms
        sentence += ", 60.0 ± 1.2 ms at batch 128"
    sentence += ". It meets the budget."
    assert verdict_lines(found)[0].endswith(sentence)
    file = tmp_path / found.point("original-onnxruntime").file
    use = f"Use {file} in ONNX Runtime; in OpenVINO, use {tmp_path / 'model.onnx'}; "
    assert f"{sentence} {use}" in last_line(found, tmp_path)
    assert f"{sentence}</h1>" in write_front_page(tmp_path, found).read_text()
    slower = with_another_runtime(made, (9.0, 900.0))
    for line in (verdict_lines(slower)[0], last_line(slower, tmp_path)):
        assert "faster and needs no search" not in line


def test_a_faster_file_in_another_runtime_is_not_recommended_if_it_exceeds_a_limit(tmp_path):
    missed = {"met": False, "shortfall": "it is slow", "limits": {"max_drop": 1, "latency_ms": {}, "megabytes": 0.05}}
    made = with_another_runtime(front_of(3).model_copy(update=missed), (0.1, 9.0))
    lacking = "It does not meet the budget: it is 0.100 MB, 2.00 times the limit."
    assert verdict_lines(made)[0].endswith(lacking)
    assert f" {lacking} {tmp_path / 'model.onnx'} is the closest network that was found; " in last_line(made, tmp_path)
    fitting = with_another_runtime(made, (0.1, 9.0), bytes=10**4)
    file = tmp_path / made.point("original-onnxruntime").file
    assert (
        f" It meets the budget. Use {file} in ONNX Runtime; in OpenVINO, {tmp_path / 'model.onnx'} is the closest "
        "network that was found; "
    ) in last_line(fitting, tmp_path)
    equal = with_another_runtime(made, (0.99 * 0.6, 0.99 * 0.6 * 128**0.9), latency_error=dict.fromkeys(SIZES, 0.02))
    assert "faster and needs no search" not in verdict_lines(equal)[0], "not measurably faster"


def test_a_saturated_metric_is_mentioned():
    made = front_of(3)
    saturated = "The accuracy of the original and of this network is 100 % on the 5000 validation images"
    perfect = {each.name: each.model_copy(update={"validation": 100.0}) for each in (*made.points, *made.baselines)}
    both = made.model_copy(
        update={
            "points": [perfect[each.name] for each in made.points],
            "baselines": [perfect[each.name] for each in made.baselines],
        }
    )
    assert sum(line.startswith(saturated) for line in verdict_lines(both)) == 1
    alone = both.model_copy(update={"best": "original"})
    for each in (made, alone):
        assert not any("cannot rank" in line for line in verdict_lines(each))
