"""Small examples of numbers.json and evidence.json, written by hand."""

from __future__ import annotations

import copy
import re

import torch

from tersor.quantization.grid import Grid
from tersor.quantization.grid_distance import drawn, on_grid
from tersor.report.analysis.predictions import png

PIXEL = png(torch.zeros(3, 1, 1, dtype=torch.uint8))
SIZES = ("1", "32")


def entry(
    ms: float, *, runtime="onnxruntime", precision="float32", score=90.0, size=4_000_000, bits=32, macs=10_000_000
):
    runs = [[ms * factor for factor in group] for group in ((0.99, 1.0, 1.01), (1.02, 1.0))]
    spread = {"median": ms, "p10": 0.99 * ms, "p90": 1.02 * ms, "n": 5}
    return {
        "runtime": runtime,
        "precision": precision,
        "float_precision": precision.rpartition(" ")[2],
        "score": score,
        "agreement": 100.0,
        "bytes": size,
        "compressed_bytes": size // 2,
        "macs": macs,
        "bit_operations": macs * bits * bits,
        "sparsity": 0.0,
        "integer_macs_share": None,
        "float_operators": [],
        "uncounted_operators": [],
        "masked": 0.0,
        "peak_memory_bytes": 20_000_000,
        "load_ms": 9.0,
        "latency_ms": dict.fromkeys(SIZES, spread),
        "latency_runs_ms": dict.fromkeys(SIZES, runs),
    }


def ratio_of(value: float, around: float = 0.05):
    """A ratio with an interval of plus and minus `around`, a fraction of the value."""
    return {"value": value, "low": value * (1 - around), "high": value * (1 + around), "n": 5, "groups": 2}


def speedups(original: float, baseline: float, around: float = 0.05):
    """Speedups, the same at every batch size."""
    values = {"original": original, "baseline": baseline}
    return {name: dict.fromkeys(SIZES, ratio_of(value, around)) for name, value in values.items()}


def numbers_at(ms: float, **changes):
    """Latencies: the artifact `ms`, the original 4 ms in ONNX Runtime and 2 ms in OpenVINO in bfloat16."""
    defaults = {"artifact": entry(ms, size=1_000_000, bits=8), "speedup": speedups(4 / ms, 2 / ms)}
    return numbers_of(**defaults | changes)


def alone(ms: float, **changes):
    """Like `numbers_at`, with only ONNX Runtime installed, so that the original is the baseline."""
    same = entry(4.0)
    baseline = {key: {"runtime": "onnxruntime", "precision": "float32"} for key in SIZES}
    defaults = {"candidates": {"onnxruntime": same}, "baseline": baseline, "speedup": speedups(4 / ms, 4 / ms)}
    return numbers_at(ms, **defaults | {"original": same} | changes)


def numbers_of(**changes):
    numbers = {
        "runtime": "onnxruntime",
        "metric": {"name": "accuracy", "unit": "%", "higher_is_better": True},
        "machine": {
            "cpu": "Some CPU",
            "cpu_kind": "vnni",
            "threads": 2,
            "system": "Linux x86_64",
            "versions": {"onnxruntime": "1.32.0", "openvino": "2026.4.1"},
        },
        "seed": 0,
        "date": "2026-11-24T08:00:00+00:00",
        "original": entry(4.0),
        "candidates": {
            "onnxruntime": entry(4.0),
            "openvino": entry(2.0, runtime="openvino", precision="bfloat16", score=89.9),
        },
        "baseline": {key: {"runtime": "openvino", "precision": "bfloat16"} for key in SIZES},
        "artifact": entry(1.0, score=89.6, size=1_000_000, bits=8, macs=5_000_000),
        "speedup": speedups(4.0, 2.0),
        "rounds": {"time_limit_seconds": 10.0, "interval_width": 0.1, "ended_by": {"1": "interval", "32": "time"}},
        "test_images": 1000,
        "classes": ["cat", "dog"],
        "stages": [
            {"name": "distil", "methods": [{"soft_targets": {"temperature": 4}}], "steps": 100, "minutes": 3.0,
             "validation_score": 90.5, "score": 90.2, "bytes": 4_000_000, "macs": 10_000_000, "sparsity": 0.0,
             "latency_ms": {"1": {"median": 3.5, "p10": 3.4, "p90": 3.6, "n": 5}}, "speedup": {"1": ratio_of(1.14)},
             "reconstruction": {"layer": "layer3", "errors": [0.9, 0.4], "before": [[[0.1, 0.7], [0.3, 0.2]]] * 6,
                                "after": [[[0.1, 0.6], [0.3, 0.3]]] * 6}},
            {"name": "draw", "methods": [{"psgd": {"bits": 4}}], "steps": 10, "minutes": 0.2, "drawn": positions_of()},
            {"name": "mask", "methods": [{"weight_pruning": {"sparsity": 0.8}}], "steps": 40, "minutes": 0.4,
             "masks": [{"steps": [10, 20, 30], "sparsity": [0.5, 0.7, 0.8], "changed": [0.5, 0.25, 0.125]}],
             "validated_at": [20, 40], "validation_by_epoch": [60.0, 80.0]},
            {"name": "quantize", "methods": ["ptq"], "steps": 0, "minutes": 0.1},
        ],
    }  # fmt: skip
    return copy.deepcopy(numbers | changes)


def without_latency(**changes):
    """The numbers of a run with `--no-latency`."""
    numbers = numbers_of(**{"latency_measured": False, "baseline": {}, "speedup": {}, "rounds": None} | changes)
    for each in (numbers["original"], numbers["artifact"], *numbers["candidates"].values()):
        each |= {"latency_ms": {}, "latency_runs_ms": {}}
    for stage in numbers["stages"]:
        stage.pop("latency_ms", None)
        stage.pop("speedup", None)
    return numbers


def with_errors(difference=0.35, **changes):
    """Numbers with the standard errors of the accuracies."""
    numbers = numbers_of(**changes)
    for each in (numbers["original"], *numbers["candidates"].values(), numbers["artifact"]):
        each["score_error"] = 0.95
    numbers["artifact"]["difference_error"] = difference
    return numbers


def positions_of(**changes):
    """Metrics of a psgd stage: all weights start a quarter step from their grid point, and half of them reach it."""
    before = on_grid(torch.tensor([[0.25, 1.25, -2.75, -0.25]]), torch.tensor(3.0), Grid.signed(3))
    after = on_grid(torch.tensor([[0.0, 1.0, -2.75, -0.25]]), torch.tensor(3.0), Grid.signed(3))
    return {"target": "grid", "scale_by": "distance", **drawn({"conv": before}, {"conv": after}), **changes}


def profile_of(*kinds: tuple[str, float]):
    operators = [{"kind": kind, "nodes": 2, "ms": ms} for kind, ms in kinds]
    return {"ms": sum(ms for _, ms in kinds), "kinds": operators, "layers": {"conv": kinds[0][1]}}


def evidence_of(**changes):
    histogram = {"unit": "steps", "low": -1.5, "width": 0.5, "before": [1, 2, 9, 8, 3, 1], "after_width": 1.0,
                 "after": [3, 17, 4], "grid": [-1, 1], "step": [0.1, 0.2, 0.3]}  # fmt: skip
    layer = {"name": "conv", "kind": "Conv2d", "original_shape": [4, 3, 1, 1], "shape": [2, 3, 1, 1], "macs": 100,
             "sparsity": 0.5, "zeros": 3, "masked": 0.25, "weight_bits": 2, "activation_bits": 8, "levels": 3,
             "clipped": 0.01, "error": 0.2, "histogram": histogram}  # fmt: skip
    floats = {"unit": "value", "low": -1.0, "width": 0.5, "before": [], "after_width": 0.5, "after": [1, 2, 3, 4],
              "grid": None, "step": None}  # fmt: skip
    linear = {**layer, "name": "linear", "kind": "Linear", "original_shape": None, "shape": [2, 2], "weight_bits": 32,
              "activation_bits": 32, "levels": None, "clipped": None, "error": None, "histogram": floats}  # fmt: skip
    size = {
        "original": profile_of(("Conv", 3.0), ("Add", 1.0)),
        "artifact": profile_of(("QLinearConv", 0.9), ("QuantizeLinear", 0.1)),
        "baseline": profile_of(("Convolution", 2.0)),
    }
    rows = [{"temperature": T, "entropy": 0.5, "probabilities": [0.75, 0.25]} for T in (1, 2, 4, 8, 16)]
    image = {"index": 7, "label": 0, "png": PIXEL}
    evidence = {
        "observed_images": 256,
        "layers": [layer, linear],
        "widths": [{"name": "conv", "before": 4, "after": 2}, {"name": "linear", "before": 2, "after": 2}],
        "masks": [{"name": "conv", "shape": [2, 3, 1, 2], "masked": 0.25,
                   "filters": [["10", "01", "11"], ["00", "11", "01"]]}],
        "profile": {"1": size, "32": size},
        "soft_targets": {
            "network": "teacher", "images": [{**image, "classes": [0, 1], "rows": rows}],
            "class_similarity": {"temperature": 4.0, "images": 1000, "rows": [[0, [0.7, 0.3]], [1, [0.2, 0.8]]]},
        },
        "attention": {
            "layers": {"teacher": ["layer1", "layer2"], "after": ["features"]},
            "images": [{**image, "maps": {"teacher": [PIXEL, PIXEL], "after": [PIXEL]}}],
        },
        "predictions": {
            "images": 1000, "agreement": 99.7, "lost": 1, "gained": 1, "other": 0,
            "classes": [{"class": 0, "images": 500, "before": 450, "after": 449},
                        {"class": 1, "images": 500, "before": 450, "after": 451}],
            "changes": [[0, 1, 2]],
            "examples": [{**image, "before": 0, "after": 1}],
        },
    }  # fmt: skip
    return copy.deepcopy(evidence | changes)


def one_line(markup: str) -> str:
    """Markup without the line breaks of its template."""
    return re.sub(r"\s*\n\s*", " ", re.sub(r"(^|>)\s*\n\s*(?=<|$)", r"\1", str(markup))).strip()
