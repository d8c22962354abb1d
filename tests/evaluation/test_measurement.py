"""The contents of numbers.json, with simulated latencies."""

from __future__ import annotations

import json
import shutil
import weakref
from importlib.util import find_spec

import pytest
import torch

import tersor
from tersor.core.progress import NullProgress
from tersor.core.target import Target
from tersor.data import Batches
from tersor.data.image_sets import Pixels
from tersor.deploy.onnx import export
from tersor.evaluation import measured_files
from tersor.evaluation import measurement as module
from tersor.evaluation.costs import Costs
from tersor.evaluation.latency import BATCH_SIZES
from tersor.evaluation.measurement import measure
from tersor.evaluation.process_footprint import Footprint
from tersor.evaluation.results import FileResults, Results, StageRecord
from tersor.evaluation.timings import NARROW, Timings
from tersor.tasks.classification import Classification
from tersor.tasks.functions import FromFunctions
from toy_networks import Small

MS = {
    "original": (4, 4, 4),
    "artifact": (2, 1, 1),
    "openvino": (8, 3, 2),
    "onnxruntime": (8, 3, 2),
    "stage 1": (3, 3, 3),
}
"""Latency of each contender at batch 1, 32 and 128."""

RECORDS = [
    StageRecord(name="first", methods=["ptq"], steps=0, minutes=0.1, bits={"first": 8}),
    StageRecord(name="second", methods=[], steps=3, minutes=0.2),
]

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Measures a small network as its own artifact and as the first of two stages."""
    torch.manual_seed(0)
    model = Small().eval()
    pixels = torch.randint(0, 256, (40, 8, 8, 3), dtype=torch.uint8)
    test = Batches(Pixels(pixels, torch.arange(40) % 5), 20, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    original = export(model, next(iter(test)).images[:1], tmp_path / "original.onnx")
    for name in ("model", "1"):
        shutil.copy(original, tmp_path / f"{name}.onnx")
    wanted = []

    def latency(contenders, example, *, ratios, seconds):
        assert example.shape == (1, 3, 8, 8)
        assert seconds == 7
        noise = (1.0, 1.01, 0.99)
        groups = {
            name: {size: [[ms * each] for each in noise] for size, ms in zip(BATCH_SIZES, MS[name], strict=True)}
            for name in contenders
        }
        timings = Timings(groups, dict.fromkeys(BATCH_SIZES, "time"))
        wanted.extend([ratio.value for ratio in ratios(timings, size)] for size in BATCH_SIZES)
        return timings

    monkeypatch.setattr(module, "measure_latency", latency)
    monkeypatch.setattr(measured_files, "footprint", lambda *_given, **_options: Footprint(1.5, 700))

    def measured(target, runtimes, **options):
        monkeypatch.setattr(module, "installed_runtimes", lambda: runtimes)
        stages = {1: (model, tmp_path / "1.onnx")}
        found, _ = measure(
            model,
            model,
            tmp_path,
            test,
            Target(runtime=target),
            Classification(),
            seed=0,
            progress=NullProgress(),
            records=RECORDS,
            stages=stages,
            seconds=7,
            **options,
        )
        assert Results.model_validate_json(found.to_json()) == found
        return json.loads(found.to_json()), wanted

    return measured


@needs_openvino
def test_the_baseline_is_the_fastest_candidate_of_a_batch_size(run):
    found, wanted = run("onnxruntime", ["onnxruntime", "openvino"])
    assert found["original"]["precision"] == "float32"
    assert found["candidates"]["onnxruntime"] == found["original"], "it runs in float32 by itself"
    assert found["version"] == 1
    assert [stage["name"] for stage in found["stages"]] == ["first", "second"]
    assert found["stages"][0]["bits"] == {"first": 8}, "metrics of the methods"
    assert found["stages"][1]["latency_ms"] == found["artifact"]["latency_ms"], "the last stage is the artifact"
    openvino = found["candidates"]["openvino"]
    assert openvino["runtime"] == "openvino"
    named = {size: (told["runtime"], told["precision"]) for size, told in found["baseline"].items()}
    assert named == {
        "1": ("onnxruntime", "float32"),
        "32": ("openvino", openvino["precision"]),
        "128": ("openvino", openvino["precision"]),
    }
    speedup = {
        name: [round(told[size]["value"], 6) for size in ("1", "32", "128")] for name, told in found["speedup"].items()
    }
    assert speedup == {"original": [2, 4, 4], "baseline": [2, 3, 2]}
    assert wanted == [pytest.approx([2, 2]), pytest.approx([4, 3]), pytest.approx([4, 2])]


def test_sessions_that_ran_the_test_set_are_closed_before_latency_is_measured(run, monkeypatch):
    """An open session would keep the memory of its largest batch."""
    ran, still_open = [], []
    predictions, say = module.file_predictions, NullProgress.say

    def remembered(session, *given):
        ran.append(weakref.ref(session))
        return predictions(session, *given)

    def record_open_sessions(self, text):
        if text.startswith("latency"):
            still_open.extend(each() for each in ran if each() is not None)
        say(self, text)

    monkeypatch.setattr(module, "file_predictions", remembered)
    monkeypatch.setattr(NullProgress, "say", record_open_sessions)
    run("onnxruntime", ["onnxruntime"])
    assert len(ran) == 3
    assert not still_open


def test_with_a_single_runtime_the_original_is_the_baseline(run):
    found, _ = run("onnxruntime", ["onnxruntime"])
    assert (found["test_images"], found["agreement_with_torch"], found["seed"]) == (40, 100, 0)
    assert found["metric"] == {"name": "accuracy", "unit": "%", "higher_is_better": True}
    original, (first, last) = found["original"], found["stages"]
    assert (original["load_ms"], original["peak_memory_bytes"], original["agreement"]) == (1.5, 700, 100)
    assert original["parameters"] == sum(each.numel() for each in Small().parameters())
    assert original["macs"] == first["macs"] == 64 * (3 * 6 + 6 * 4) * 9 + 4 * 5
    assert original["bit_operations"] == original["macs"] * 32 * 32
    assert original["latency_ms"]["1"] == pytest.approx({"median": 4, "p10": 3.968, "p90": 4.032, "n": 3})
    assert original["bytes"] == first["bytes"] == last["bytes"] > original["compressed_bytes"] > 0
    assert 0 <= original["score"] == first["score"] == found["artifact"]["score"] <= 100
    assert found["candidates"] == {"onnxruntime": found["original"]}
    assert found["baseline"] == {key: {"runtime": "onnxruntime", "precision": "float32"} for key in ("1", "32", "128")}
    assert found["speedup"]["original"] == found["speedup"]["baseline"]
    assert found["rounds"] == {
        "time_limit_seconds": 7,
        "interval_width": NARROW,
        "ended_by": dict.fromkeys(("1", "32", "128"), "time"),
    }
    assert found["stages"][0]["speedup"]["1"]["value"] == pytest.approx(4 / 3)


def test_a_stage_that_quantizes_is_compared_with_the_previous_stage(run, tmp_path):
    found, _ = run("onnxruntime", ["onnxruntime"])
    assert not any("speedup_of_quantization" in stage for stage in found["stages"]), "all files hold floats"
    images = torch.rand(8, 3, 8, 8)
    tersor.export(tersor.quantize(Small().eval(), images), images, tmp_path / "model.onnx")
    found, _ = run("onnxruntime", ["onnxruntime"])
    first, second = found["stages"]
    assert "speedup_of_quantization" not in first
    assert [second["speedup_of_quantization"][size]["value"] for size in ("1", "32", "128")] == pytest.approx(
        [1.5, 3, 3]
    )
    assert found["artifact"]["precision"] == "int8"


@needs_openvino
def test_the_original_runs_in_float32_even_if_openvino_prefers_another_precision(run):
    found, _ = run("openvino", ["onnxruntime", "openvino"])
    assert (found["original"]["runtime"], found["original"]["precision"]) == ("openvino", "float32")
    own = found["candidates"]["openvino"]
    assert (own == found["original"]) == (own["precision"] == "float32")
    assert found["candidates"]["onnxruntime"]["runtime"] == "onnxruntime"


@pytest.mark.parametrize(
    ("bit_operations", "precision", "expected"),
    [(10 * 32 * 32, "float32", 10 * 32 * 32), (10 * 32 * 32, "bfloat16", 10 * 16 * 16), (640, "bfloat16", 640)],
)
def test_bit_operations_of_float_networks_use_the_executed_precision(bit_operations, precision, expected):
    counted = Costs(parameters=1, macs=10, bit_operations=bit_operations, sparsity=0.0, masked=0.0, layers=())
    assert measured_files._bit_operations(counted, precision) == expected


def test_without_latency_nothing_is_timed_and_no_speedup_is_reported(run, monkeypatch):
    monkeypatch.setattr(module, "measure_latency", None)
    monkeypatch.setattr(module, "multiply_peaks", None)
    found, _ = run("onnxruntime", ["onnxruntime"], latency=False)
    assert found["latency_measured"] is False
    assert (found["baseline"], found["speedup"], found["rounds"], found["peaks"]) == ({}, {}, None, [])
    for entry in (found["original"], found["artifact"], found["candidates"]["onnxruntime"]):
        assert (entry["latency_ms"], entry["latency_runs_ms"]) == ({}, {})
        assert (entry["load_ms"], entry["peak_memory_bytes"]) == (1.5, 700)
    for stage in found["stages"]:
        assert stage["bytes"] == found["original"]["bytes"]
        assert not {"latency_ms", "speedup", "speedup_of_quantization"} & set(stage)


def scored(artifact, task=None):
    """The scores of an original with 340 of 359 correct predictions, and of an artifact."""
    targets = torch.zeros(359, dtype=torch.int64)
    original = (torch.arange(359) >= 340).long()
    predictions = {"original": original, "artifact": artifact(original)}
    measured = measured_files.MeasuredFiles({}, {}, {}, predictions, None, targets, task or Classification(), None)
    return measured.scores("original"), measured.scores("artifact")


def test_accuracy_has_a_standard_error_and_the_error_of_the_paired_difference():
    def five_lost_three_gained(original):
        changed = original.clone()
        changed[:5], changed[-3:] = 1, 0
        return changed

    original, artifact = scored(five_lost_three_gained)
    share = 340 / 359
    assert original == pytest.approx({"score": 100 * share, "score_error": 100 * (share * (1 - share) / 359) ** 0.5})
    share = 338 / 359
    # -1 five times, +1 three times, and one of each so that the error is never 0, among 361 images
    variance = 10 / 361 - (2 / 361) ** 2
    assert artifact == pytest.approx(
        {
            "score": 100 * share,
            "score_error": 100 * (share * (1 - share) / 359) ** 0.5,
            "difference_error": 100 * (variance / 359) ** 0.5,
        }
    )
    assert (round(artifact["score_error"], 2), round(artifact["difference_error"], 2)) == (1.24, 0.88)
    for name in ("score_error", "difference_error"):  # `scores` returns neither for other metrics
        assert "for metrics other than the accuracy" in (FileResults.model_fields[name].description or "")


def test_a_users_metric_has_no_standard_error():
    task = FromFunctions(Classification(), None, lambda *_: 0.5)
    assert [set(each) for each in scored(torch.clone, task)] == [{"score"}, {"score"}]
