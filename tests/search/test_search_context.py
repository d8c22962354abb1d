"""The points of a search: recorded, compared, chosen and read again; the use of the test images at the end."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from search_fakes import FakeLatency, baseline, searching
from tersor.core.errors import InputError
from tersor.search import point_evidence, tested_points
from tersor.search.candidate import Candidate
from tersor.search.candidate_latency import Latency
from tersor.search.compression_budget import Budget
from tersor.search.point_evidence import _agreement, _examples, _inside, read_evidence
from tersor.search.state import read_state
from tersor.search.study import Record
from tersor.search.workbench import Exported
from tersor.tasks.classification import Classification

RIGHT = np.arange(1000) % 10 > 0


def exported(search, name, right=None):
    file = search.folder.point_file(name)
    file.write_text(name)
    FakeLatency.of = {**FakeLatency.of, name: 0.5}
    return Exported(file, 88.0, 10**6, 50_000, right)


def test_a_record_contains_the_measured_values(tmp_path):
    search = searching(tmp_path / "out")
    search.folder.keep_original_right(RIGHT)
    changed = RIGHT.copy()
    changed[:20] = True
    made = search.record(
        Candidate(branches=3), exported(search, "a", changed), rung=2, steps=70, seconds=12.34,
        stages=({"name": "train-1"},), rounding_loss=0.5,
    )  # fmt: skip
    point = made.point
    assert (point.name, point.file, point.description) == (
        "original-branches3-8bit-70steps", "points/a/model.onnx", "original, 3 branches removed, 8 bits"
    )  # fmt: skip
    assert (point.runtime, point.precision, point.family, point.free) == (
        "onnxruntime",
        "int8",
        "fewer branches",
        False,
    )
    assert (point.validation, point.bytes, point.macs, point.steps, point.seconds) == (88.0, 50_000, 10**6, 70, 12.3)
    assert point.latency_ms == {1: 0.5, 128: 64.0}
    # two images of 1000 changed; two more, +1 and -1, keep the error above zero
    expected = 100 * np.std([1, 1, 1, -1, *[0] * 998]) / math.sqrt(1000)
    assert point.drop_error == pytest.approx(expected, abs=1e-3)
    assert (made.rung, made.stages, made.rounding_loss) == (2, [{"name": "train-1"}], 0.5)
    assert made.of == Candidate(branches=3)
    free = search.record(Candidate(), exported(search, "b")).point
    assert (free.free, free.name, free.seconds) == (True, "original-8bit", 0.0)
    assert free.drop_error == pytest.approx(100 * math.sqrt(0.88 * 0.12 / 1000), abs=1e-3), "that of the metric"
    assert not search.record(Candidate(), exported(search, "c"), rung=1).point.free


def test_networks_for_another_image_size_are_timed_with_an_image_of_that_size(tmp_path):
    search = searching(tmp_path / "out")
    seen = []
    search.bench.example = lambda candidate: f"image of {candidate.pixels}"
    search.measurement.latency = lambda _file, image: seen.append(image) or Latency({1: 1.0}, {1: 0.02})
    for pixels in (None, 24):
        point = search.record(Candidate(pixels=pixels), exported(search, "a")).point
        assert (point.latency_ms, point.latency_error) == ({1: 1.0}, {1: 0.02})
    assert seen == [None, "image of 24"]


def test_a_better_point_becomes_the_best_and_is_shown(tmp_path):
    search = searching(tmp_path / "out", budget=Budget(max_drop=1.0))
    for name, validation, milliseconds, best in (
        ("slower", 90.0, 1.2, Candidate().name),
        ("faster", 89.5, 0.5, "faster"),
        ("worse", 80.0, 0.1, "faster"),
    ):
        point = baseline(name, validation, milliseconds, "int8").model_copy(
            update={"file": f"points/{name}/model.onnx"}
        )
        search.folder.point_file(name).write_text(name)
        search.add(point, "recipe")
        assert search.best.name == search.choose().name == best
    assert (search.folder.path / "model.onnx").read_text() == "faster"
    assert search.bar.values == {"best": 89.5, "ms at batch 1": 0.5}
    assert [point.name for point in search.points] == ["original", Candidate().name, "slower", "faster", "worse"]
    search.add(point, "recipe")
    assert len(search.points) == 5, "a point of the same name is replaced"
    assert search.original.name == "original"


def test_an_equal_copy_does_not_replace_the_best_point(tmp_path):
    search = searching(tmp_path / "out", budget=Budget(max_drop=5.0))
    for name, validation, size, best in (
        ("winner", 89.0, 50_017, "winner"),
        ("copy", 89.0, 50_000, "winner"),
        ("worse", 85.0, 50_000, "winner"),
        ("longer", 89.5, 50_034, "longer"),
    ):
        file = f"points/{name}/model.onnx"
        point = baseline(name, validation, 0.5, "int8").model_copy(update={"file": file, "bytes": size})
        search.folder.point_file(name).write_text(name)
        search.add(point, "recipe")
        assert search.best.name == search.choose().name == best
        assert next(each.name for each in search.front()) == best
    assert (search.folder.path / "model.onnx").read_text() == "longer"


def test_points_and_costs_of_an_earlier_process_are_restored(tmp_path):
    search = searching(tmp_path / "out")
    state = search.folder.state
    state.baselines.append(baseline("original-openvino", 90.0, 0.1, "int8").model_copy(update={"runtime": "openvino"}))
    state.baselines.append(baseline("original-float32", 90.0, 0.2, "float32"))
    for candidate, rung in (
        (Candidate(branches=3), 0),
        (Candidate("wide"), 0),
        (Candidate("wide"), 1),
        (Candidate(branches=5), 0),
    ):
        name = candidate.name if not rung else f"{candidate.name}-{rung}"
        point = baseline(name, 80.0, 0.4, "int8").model_copy(update={"file": f"points/{name}/model.onnx"})
        search.study.add(Record(candidate=candidate.parameters, rung=rung, point=point))
        if candidate.branches != 5:
            search.folder.point_file(name).write_text(name)
    search.restore()
    assert [point.name for point in search.points] == [
        "original", Candidate().name, "original-branches3-8bit", "wide-8bit-1"
    ]  # fmt: skip
    assert search.best.name == Candidate().name
    assert (search.folder.path / "model.onnx").read_text() == Candidate().name
    with search.timed("finish"):
        search.bench.time.work(7.0)
    assert state.costs.finish == 7.0
    assert search.candidate_of(search.points[2]) == Candidate(branches=3)
    assert search.candidate_of(search.points[0]) == Candidate()
    state.finished, state.survey_until, state.rungs = True, 5.0, []
    search.restore()
    assert (state.finished, state.extended, state.survey_until) == (False, True, None), "and surveys"


def test_points_of_the_front_and_free_baselines_are_evaluated_on_the_test_images(tmp_path):
    search = searching(tmp_path / "out")
    data = search.bench.experiment.data
    data.classes = ("a", "b", "c")
    worse = baseline("worse", 80.0, 5.0, "int8").model_copy(update={"free": False})
    search.points = [*reversed(search.points), worse]
    targets = torch.tensor([0, 0, 1, 1])
    predicted = {"original": torch.tensor([0, 0, 1, 0]), Candidate().name: torch.tensor([0, 1, 1, 0])}
    order = []

    def predictions(_candidate, file):
        order.append(file.stem)
        return predicted[file.stem], targets

    search.bench.test_predictions = predictions
    found = tested_points.run_on_test_images(search)
    assert order == ["original", Candidate().name], "the original first"
    assert {point.name: point.test for point in search.points} == {
        "original": 75.0, Candidate().name: 50.0, "worse": None
    }  # fmt: skip
    assert (found["original"].agreement, found[Candidate().name].agreement) == (100.0, 75.0)
    assert found["original"].by_class == [100.0, 50.0, None]
    assert found[Candidate().name].classes is predicted[Candidate().name]
    error = 100 * np.std([0, -1, 0, 0, 1, -1]) / math.sqrt(len(data.test))
    assert [point.test_drop_error for point in search.points] == pytest.approx([error, 0.0, 0.0])
    assert search.evidence_seconds == search.folder.state.costs.evidence(2)
    assert not search.tested_at_the_end()
    data.classes = ()
    search.points = [point.model_copy(update={"test": None}) for point in search.points]
    again = tested_points.run_on_test_images(search)
    assert len(order) == 2, "no point runs twice"
    assert search.folder.state.test_runs == [order]
    assert {point.test for point in search.points} == {75.0, 50.0, None}
    assert again["original"].by_class == found["original"].by_class
    assert again["original"].classes.tolist() == [0, 0, 1, 0]
    kept = json.loads((search.folder.path / "tested.json").read_text())
    (search.folder.path / "tested.json").write_text(json.dumps({"original": [*kept["original"][:3], None, 0.0]}))
    search.points = [point.model_copy(update={"test": None}) for point in search.points]
    tested_points.run_on_test_images(search)
    assert order[2:] == order[:2], "the original too: its predictions were not kept, and a new point needs them"
    (search.folder.path / "tested.json").unlink()
    search.points = [point.model_copy(update={"test": None}) for point in search.points]
    assert tested_points.run_on_test_images(search)["original"].by_class == []


def test_agreement_is_computed_with_every_point_or_only_with_the_original():
    predicted = {"a": torch.tensor([0, 1, 1]), "b": torch.tensor([0, 1, 0])}
    found = _agreement(Classification(), "a", tested_points.Tested(0.0, None, []), predicted, "a")
    assert found == {"a": 100.0, "b": 66.667}
    assert _agreement(Classification(), "c", tested_points.Tested(0.0, 12.3456, []), predicted, "a") == {"a": 12.346}
    assert _agreement(Classification(), "c", tested_points.Tested(0.0, None, []), predicted, "a") == {}


def test_examples_are_images_on_which_predictions_differ(monkeypatch):
    monkeypatch.setattr(point_evidence, "image_entry", lambda _images, index: {"index": index})
    monkeypatch.setattr(point_evidence, "_EXAMPLES", 3)
    first = torch.zeros(10, dtype=torch.int64)
    other = first.clone()
    other[[1, 3, 5, 7, 9]] = 2
    found = _examples({"a": first, "b": other, "c": first}, None)
    assert [each["index"] for each in found] == [1, 5, 9]
    assert found[0]["predicted"] == {"a": 0, "b": 2, "c": 0}
    assert _examples({}, None) == _examples({"a": first}, None) == []


def test_layers_and_operators_of_a_file_have_times_for_the_whole_batch(tmp_path, monkeypatch):
    search = searching(tmp_path / "out")
    search.bench.example = lambda _candidate: None
    layers = [SimpleNamespace(name="bn", channels=8, bits=8), SimpleNamespace(name="other", channels=4, bits=32)]
    monkeypatch.setattr(point_evidence, "file_layers", lambda _file: layers)
    monkeypatch.setattr(
        point_evidence, "replace", lambda layer, *, name: SimpleNamespace(**{**vars(layer), "name": name})
    )
    profile = {"layers": {"conv": 0.123456}, "kinds": [{"kind": "Conv", "nodes": 2, "ms": 0.5}]}
    given = []

    def times(_file, _point, _image, names):
        given.append(names)
        return {"1": (1, profile), "128": (43, profile)}

    monkeypatch.setattr(point_evidence, "_times", times)
    found = _inside(search, search.points[0], {"bn": "conv"})
    assert given == [{"conv": "conv", "other": "other", "bn": "conv"}]
    assert found["layers"] == [
        ["conv", 8, 8, {"1": 0.1235, "128": round(43 * 0.123456, 4)}], ["other", 4, 32, {"1": 0.0, "128": 0.0}]
    ]  # fmt: skip
    assert found["time"] == {"1": [["Conv", 2, 0.5]], "128": [["Conv", 2, 21.5]]}


def test_evidence_is_empty_before_the_end(tmp_path):
    assert read_evidence(tmp_path) == {}
    (tmp_path / "evidence.json").write_text(json.dumps({"a": 1}))
    assert read_evidence(tmp_path) == {"a": 1}
    (tmp_path / "evidence.json").write_text("{")
    with pytest.raises(InputError, match=r"Remove the file; report\.html is then written without scores"):
        read_evidence(tmp_path)


def test_an_interrupted_test_counts_its_points_and_repeats_only_the_last_one(tmp_path):
    search = searching(tmp_path / "out")
    order, targets = [], torch.tensor([0, 1])

    def predictions(_candidate, file):
        order.append(file.stem)
        if len(order) == 2:
            raise KeyboardInterrupt
        return targets, targets

    search.bench.test_predictions = predictions
    with pytest.raises(KeyboardInterrupt):
        tested_points.run_on_test_images(search)
    assert read_state(search.folder.path / "search.json").test_runs == [order]
    assert search.folder.state.test_runs == [["original", Candidate().name]]
    tested_points.run_on_test_images(search)
    assert order == ["original", Candidate().name, Candidate().name]
    assert search.folder.state.test_runs == [order[:2], order[2:]]
    tested_points.run_on_test_images(search)
    assert len(search.folder.state.test_runs) == 2, "nothing ran"
