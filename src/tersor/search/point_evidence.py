"""Data for comparing two points on the page of a search: scores by class, agreement, images, layers, node times.

It is measured at the end, for the points that run on the test images: the Pareto front and the free baselines of the
target runtime.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tersor.core.files import read_json, write_file
from tersor.data import Images
from tersor.deploy.file_layers import file_layers
from tersor.evaluation.multiply_peak import multiply_peaks
from tersor.evaluation.node_profile import profile
from tersor.evaluation.scoring import agreement
from tersor.evaluation.session import Array, open_session
from tersor.report.analysis.predictions import evenly_spaced, image_entry
from tersor.search.end_costs import folded_layers
from tersor.search.folder import Front
from tersor.search.front import Point
from tersor.search.plan import PROFILED_RUNS
from tersor.search.search_context import Search
from tersor.search.tested_points import MOST_CLASSES, Tested
from tersor.tasks.task import Task

EVIDENCE = "evidence.json"
_EXAMPLES = 60
_DIGITS = 4


def write_evidence(search: Search, front: Front, tested: Mapping[str, Tested]) -> None:
    """Write `evidence.json` for the points of a finished search that ran on the test images.

    `peaks`: the machine's peak throughput. `classes`: the first hundred names. `points`, by name: `agreement` (percent,
    by name of the other point; only with the original if predictions are not class indices), `by_class` (scores, None
    for a class that does not occur), `layers` ([name, output channels, stored bits, ms by batch size]) and `time` (by
    batch size, [operator, nodes, ms]). `examples`: up to sixty images for which predictions differ, with the class that
    each point predicts; empty for tasks other than classification.
    """
    experiment = search.bench.experiment
    folded = folded_layers(search)
    predicted = {name: each.classes for name, each in tested.items() if each.classes is not None}
    evidence = {
        "peaks": [peak.model_dump() for peak in multiply_peaks(sorted({each.runtime for each in front.baselines}))],
        "classes": list(experiment.data.classes[:MOST_CLASSES]),
        "points": {
            name: {
                "agreement": _agreement(experiment.task, name, each, predicted, front.original),
                "by_class": each.by_class,
                **_inside(search, front.point(name), folded),
            }
            for name, each in tested.items()
        },
        "examples": _examples(predicted, experiment.data.test),
    }
    write_file(search.folder.path / EVIDENCE, json.dumps(evidence).encode())


def read_evidence(folder: Path) -> dict[str, Any]:
    """The content of `evidence.json`; empty before the end of a search.

    Raises:
        InputError: it is damaged.
    """
    file = folder / EVIDENCE
    advice = "Remove the file; report.html is then written without scores by class, layers and node times."
    return read_json(file, advice) if file.is_file() else {}


def _agreement(
    task: Task, name: str, tested: Tested, predicted: Mapping[str, Tensor], original: str
) -> dict[str, float]:
    if name in predicted:
        return {other: round(agreement(task, predicted[name], each), 3) for other, each in predicted.items()}
    return {} if tested.agreement is None else {original: round(tested.agreement, 3)}


def _inside(search: Search, point: Point, folded: Mapping[str, str]) -> dict[str, Any]:
    """Layers and node times of a file.

    Args:
        search: the search.
        point: the point.
        folded: names of BatchNorms, which name the layers of a float file -> the layers that they are folded into.
    """
    file = search.folder.path / point.file
    layers = [replace(layer, name=folded.get(layer.name, layer.name)) for layer in file_layers(file)]
    names = {**{layer.name: layer.name for layer in layers}, **folded}
    times = _times(file, point, search.bench.example(search.candidate_of(point)), names)
    return {
        "layers": [
            [layer.name, layer.channels, layer.bits,
             {size: round(runs * each["layers"].get(layer.name, 0.0), _DIGITS) for size, (runs, each) in times.items()}]
            for layer in layers
        ],
        "time": {
            size: [[kind["kind"], kind["nodes"], round(runs * kind["ms"], _DIGITS)] for kind in each["kinds"]]
            for size, (runs, each) in times.items()
        },
    }  # fmt: skip


def _times(file: Path, point: Point, image: Array, names: Mapping[str, str]) -> dict[str, tuple[int, dict[str, Any]]]:
    """By batch size: the number of runs, and the profile of one. A file with a fixed batch size may need several."""
    fixed = open_session(file, point.runtime).batch
    profiles = {
        size: profile(file, point.runtime, np.repeat(image, size, axis=0), names, runs=PROFILED_RUNS)
        for size in ([fixed] if fixed else point.latency_ms)
    }
    return {str(size): (-(-size // (fixed or size)), profiles[fixed or size]) for size in point.latency_ms}


def _examples(predicted: Mapping[str, Tensor], images: Images) -> list[dict[str, Any]]:
    if not predicted:
        return []
    first = next(iter(predicted.values()))
    differs = sum((each != first).long() for each in predicted.values())
    assert isinstance(differs, Tensor)
    places = differs.nonzero().flatten()
    chosen = places[evenly_spaced(len(places), _EXAMPLES)].tolist() if len(places) else []
    return [
        {**image_entry(images, index), "predicted": {name: int(each[index]) for name, each in predicted.items()}}
        for index in chosen
    ]
