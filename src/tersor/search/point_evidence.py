"""What the page of a search compares two points by: scores by class, agreement, changed images, layers, node times.

It is measured at the end, for the points that run on the test images: the Pareto front and the free baselines.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tersor.core.files import read_json, write_file
from tersor.data import Images
from tersor.deploy.file_layers import file_layers
from tersor.evaluation.measurement import arrays
from tersor.evaluation.multiply_peak import multiply_peaks
from tersor.evaluation.node_profile import profile
from tersor.evaluation.scoring import agreement, file_predictions, targets_of
from tersor.evaluation.session import Array, open_session
from tersor.report.analysis.evidence import layers_by_module
from tersor.report.analysis.predictions import evenly_spaced, image_entry
from tersor.search.folder import Front
from tersor.search.front import Point
from tersor.search.search_context import Search
from tersor.tasks.classification import Classification
from tersor.tasks.task import Task

EVIDENCE = "evidence.json"
_EXAMPLES = 60
_MOST_CLASSES = 100
_RUNS = 10
_DIGITS = 4


@dataclass(frozen=True)
class _Tested:
    """A point with its predictions for the test images, and one image (1, C, H, W) of its size."""

    point: Point
    file: Path
    predictions: Any
    image: Array


def write_evidence(search: Search, front: Front) -> None:
    """Write `evidence.json` for the points of a finished search that ran on the test images.

    `peaks`: the machine's peak throughput. `classes`: the first hundred names. `points`, by name: `agreement` (percent,
    by name of the other point; only with the original if predictions are not class numbers), `by_class` (scores, None
    for a class that does not occur), `layers` ([name, output channels, stored bits, ms by batch size]) and `time` (by
    batch size, [operator, nodes, ms]). `examples`: up to sixty images for which predictions differ, with the class that
    each point predicts; empty for other tasks than classification.
    """
    experiment = search.bench.experiment
    task, data = experiment.task, experiment.data
    points = {point.name: point for point in [*front.points, *front.baselines]}
    tested = {
        name: _test(search, point)
        for name, point in points.items()
        if point.runtime == front.runtime and point.test is not None
    }
    targets = targets_of(experiment.batches(data.test, experiment.evaluation_batch))
    classifies = isinstance(task, Classification)
    original = copy.deepcopy(experiment.model).cpu().float().eval()
    folded = layers_by_module(original, next(iter(search.bench.validation)).only_images[:2])
    others = tested if classifies else {front.original: tested[front.original]}
    evidence = {
        "peaks": [peak.model_dump() for peak in multiply_peaks(sorted({each.runtime for each in front.baselines}))],
        "classes": list(data.classes[:_MOST_CLASSES]),
        "points": {
            name: {**_predicted(task, each, others, targets, data.classes), **_inside(each, folded)}
            for name, each in tested.items()
        },
        "examples": _examples(tested, data.test) if classifies else [],
    }
    write_file(search.folder.path / EVIDENCE, json.dumps(evidence).encode())


def read_evidence(folder: Path) -> dict[str, Any]:
    """The content of `evidence.json`; empty before the end of a search.

    Raises:
        InputError: it is damaged.
    """
    file = folder / EVIDENCE
    return read_json(file, "Run the search again.") if file.is_file() else {}


def _test(search: Search, point: Point) -> _Tested:
    """Run a point on the test images."""
    candidate, file = search.candidate_of(point), search.folder.path / point.file
    experiment = search.bench.experiment_of(candidate, (candidate.rounding,))
    test = experiment.batches(experiment.data.test, experiment.evaluation_batch)
    images = arrays(test, experiment.recipe.target.input)
    predictions = file_predictions(open_session(file, point.runtime), images, experiment.task)
    return _Tested(point, file, predictions, search.bench.example(candidate))


def _predicted(
    task: Task, tested: _Tested, others: Mapping[str, _Tested], targets: Any, classes: Sequence[str]
) -> dict[str, Any]:
    """Agreement and scores by class; empty for outputs that have the size of other images."""
    same_size = all(each.image.shape == tested.image.shape for each in others.values())
    if not isinstance(task, Classification) and not same_size:
        return {"agreement": {}, "by_class": []}
    scores = task.score_by_class([(tested.predictions, targets)], len(classes)) if classes else None
    by_class = [] if scores is None else scores[:_MOST_CLASSES].tolist()
    return {
        "agreement": {
            name: round(agreement(task, tested.predictions, each.predictions), 3) for name, each in others.items()
        },
        "by_class": [None if math.isnan(value) else round(value, 2) for value in by_class],
    }


def _inside(tested: _Tested, folded: Mapping[str, str]) -> dict[str, Any]:
    """Layers and node times of a file.

    Args:
        tested: the point.
        folded: names of BatchNorms, which name the layers of a float file -> the layers that they are folded into.
    """
    layers = [replace(layer, name=folded.get(layer.name, layer.name)) for layer in file_layers(tested.file)]
    names = {**{layer.name: layer.name for layer in layers}, **folded}
    times = {
        str(size): profile(
            tested.file, tested.point.runtime, np.repeat(tested.image, size, axis=0), names, runs=_RUNS
        )
        for size in tested.point.latency_ms
    }  # fmt: skip
    return {
        "layers": [
            [layer.name, layer.channels, layer.bits,
             {size: round(each["layers"].get(layer.name, 0.0), _DIGITS) for size, each in times.items()}]
            for layer in layers
        ],
        "time": {
            size: [[kind["kind"], kind["nodes"], round(kind["ms"], _DIGITS)] for kind in each["kinds"]]
            for size, each in times.items()
        },
    }  # fmt: skip


def _examples(tested: Mapping[str, _Tested], images: Images) -> list[dict[str, Any]]:
    predictions: dict[str, Tensor] = {name: each.predictions for name, each in tested.items()}
    first = next(iter(predictions.values()))
    differs = sum((each != first).long() for each in predictions.values())
    assert isinstance(differs, Tensor)
    places = differs.nonzero().flatten()
    chosen = places[evenly_spaced(len(places), _EXAMPLES)].tolist() if len(places) else []
    return [
        {**image_entry(images, index), "predicted": {name: int(each[index]) for name, each in predictions.items()}}
        for index in chosen
    ]
