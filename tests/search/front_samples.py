"""A finished search of 200 trials, in the form of `front.json` and `evidence.json`; the numbers are random."""

from __future__ import annotations

import json

import numpy as np
import torch

from tersor.evaluation.results import Machine
from tersor.report.analysis.predictions import png
from tersor.search.candidate import Candidate
from tersor.search.folder import Front
from tersor.search.front import BaselineSpeedup, Point, front

SIZES = (1, 128)
CLASSES = ["cat", "dog", "</script><script>alert(1)</script>"]
FAMILIES = ("fewer branches", "fewer channels", "fewer branches and channels", "student networks")


def point(name, validation, ms, **more):
    given = {"description": name, "file": f"points/{name}/model.onnx", "precision": "int8", "bytes": int(2e5 * ms)}
    latency = {size: ms * size**0.9 for size in SIZES}
    defaults = {"name": name, "runtime": "openvino", "macs": int(1e8 * ms), "latency_ms": latency}
    return Point(**(defaults | given | {"validation": validation} | more))


def _speedup():
    return BaselineSpeedup(baseline="original-8bit", value=1.7, low=1.6, high=1.8, n=9, groups=3)


def front_of(trials=199):
    drawn = np.random.default_rng(0)
    baselines = [
        point("original", 94.0, 2.0, precision="bfloat16", free=True, test=93.5),
        point("original-8bit", 93.8, 1.0, free=True, test=93.4),
        point("original-onnxruntime", 94.0, 4.0, precision="float32", runtime="onnxruntime", free=True),
    ]
    points = list(baselines[:2])
    for number in range(trials):
        ms = float(drawn.uniform(0.2, 2.5))
        validation = 94 - 12 * max(0.0, 1 - ms) ** 2 - float(drawn.uniform(0, 3))
        description = str(Candidate(branches=number))
        family = FAMILIES[number % len(FAMILIES)]
        points.append(point(f"t{number}", validation, ms, description=description, family=family, steps=100))
    points.append(point("best", 93.4, 0.6, description="original, 9 branches removed, 8 bits", family=FAMILIES[0]))
    kept = [each.model_copy(update={"test": each.validation - 0.4}) for each in front(points)]
    names = {each.name for each in kept}
    machine = {"cpu": "Some CPU", "cpu_kind": "vnni", "threads": 2, "system": "Linux x86_64", "versions": {}}
    return Front(
        metric="accuracy", budget="at most 1 point lost", runtime="openvino", mean=None, std=None,
        limits={"max_drop": 1.0, "latency_ms": {"1": 0.9}, "megabytes": None},
        minutes=45.0, minutes_used=44.0, machine=Machine.model_validate(machine), validation_images=5000,
        validation_error=0.3, test_images=10000, original="original", baselines=baselines, best="best", met=True,
        shortfall="", advice=[], points=kept,
        speedup={size: _speedup() for size in SIZES},
        dominated=[each for each in points if each.name not in names], failed={},
    )  # fmt: skip


def evidence_for(made):
    """Evidence for the Pareto front and the free baselines; images are noise, which is the least compressible."""
    drawn = torch.Generator().manual_seed(0)
    tested = {each.name: each for each in [*made.points, *made.baselines[:2]]}
    peak = {"runtime": "openvino", "n": 9}
    rates = {"float32": 1e11, "bfloat16": 2e11, "int8": 4e11}
    return {
        "peaks": [peak | {"precision": kind, "macs_per_second": rate, "median": 0.9 * rate}
                  for kind, rate in rates.items()],
        "classes": CLASSES,
        "points": {
            name: {
                "agreement": {other: 100.0 if other == name else 97.5 for other in tested},
                "by_class": [each.validation - 1, each.validation + 1, None],
                "layers": [[f"layer{place}.conv", 64 - place, 8, {"1": 0.01, "128": 1.0}] for place in range(56)],
                "time": {str(size): [["Convolution", 56, 0.4 * size], ["Reorder", 2, 0.01]] for size in SIZES},
            }
            for name, each in tested.items()
        },
        "examples": [
            {"index": place, "label": place % 3, "png": png(torch.randint(256, (3, 32, 32), generator=drawn).byte()),
             "predicted": {name: (place + order) % 3 for order, name in enumerate(tested)}}
            for place in range(60)
        ],
    }  # fmt: skip


def write(folder, made):
    (folder / "evidence.json").write_text(json.dumps(evidence_for(made)))
