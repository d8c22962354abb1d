"""Measure the files of a run in the runtimes: the metric on the whole test set, and interleaved latency.

The baseline of a batch size is the candidate with the lowest median in the same rounds that its ratio is computed from.
The minimum of several noisy medians is too low on average, so the speedup over the baseline is, if anything,
underestimated.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tersor.core.machine import machine
from tersor.core.progress import ProgressReporter
from tersor.core.target import Target
from tersor.data import Batches
from tersor.deploy.float_operators import float_operators
from tersor.evaluation.costs import costs
from tersor.evaluation.executed_precision import unlisted_warning
from tersor.evaluation.latency import (
    BATCH_SIZES,
    Array,
    measure_latency,
)
from tersor.evaluation.measured_files import File, MeasuredFiles
from tersor.evaluation.multiply_peak import multiply_peaks
from tersor.evaluation.results import VERSION, Results, StageRecord
from tersor.evaluation.scoring import agreement, file_predictions, network_predictions, targets_of
from tersor.evaluation.session import Session, installed_runtimes
from tersor.evaluation.timings import Ratio, Timings
from tersor.tasks.task import Task


def arrays(batches: Batches, input_kind: str) -> Iterator[Array]:
    """The images in the input format of a file: normalized float32, or uint8 pixels."""
    if input_kind == "normalized":
        for batch in batches:
            yield np.ascontiguousarray(batch.only_images.numpy())
    else:
        for index in torch.arange(len(batches.images)).split(batches.batch_size):
            yield batches.images.take(index).numpy()


def measure(
    original: nn.Module,
    model: nn.Module,
    folder: Path,
    test: Batches,
    target: Target,
    task: Task,
    *,
    seed: int,
    progress: ProgressReporter,
    records: Sequence[StageRecord] = (),
    stages: Mapping[int, tuple[nn.Module, Path]] | None = None,
    seconds: float = 10.0,
    latency: bool = True,
    **data: Any,
) -> tuple[Results, dict[str, Any]]:
    """Measure the original, the baseline candidates, the artifact, and the files after each stage.

    Args:
        original: the network before compression.
        model: the compressed network in torch.
        folder: contains `original.onnx` and `model.onnx`.
        test: the whole test set, in order.
        target: the runtime to measure in.
        task: the task of the network.
        seed: the seed of the recipe.
        progress: reports the progress.
        records: records of the stages, which are completed with the measurements.
        stages: by number of a stage except the last: the network after it, and its file.
        seconds: time limit for the latency of one batch size.
        latency: whether to measure it, and the peak throughput of the machine.
        data: `mean`, `std` and `classes` of the data, for the results.

    Returns:
        The results, and the predictions of the original, the candidates and the artifact.
    """
    example = next(iter(test)).images[:1].contiguous()
    files = {
        "original": File(folder / "original.onnx", target.runtime, "float32", costs(original, example)),
        "artifact": File(folder / "model.onnx", target.runtime, None, costs(model, example)),
    }
    sessions = {name: file.open() for name, file in files.items()}
    candidates = _add_candidates(files, sessions)
    compared = list(files)
    for number, (network, path) in (stages or {}).items():
        name = f"stage {number}"
        files[name] = File(path, target.runtime, None, costs(network, example))
        sessions[name] = files[name].open()
    measured = _measured(files, sessions, candidates, test, target, task, seconds if latency else None, progress)
    agreement_with_torch = agreement(task, measured.predictions["artifact"], network_predictions(model, test, task))
    in_float, warning = float_operators(model, example)
    for each in filter(None, (warning, unlisted_warning(files["artifact"].path, target.runtime, model, example))):
        progress.say(f"warning: {each}")
    by_file = {name: measured.file(name) for name in compared}
    names = {0: "original", **{number: f"stage {number}" for number in sorted(stages or {})}, len(records): "artifact"}
    by_stage = {
        number: measured.stage(names[number], names[before]) for before, number in itertools.pairwise(sorted(names))
    }
    results = Results.model_validate(
        {
            "version": VERSION,
            "runtime": target.runtime,
            "target": target,
            "metric": {"name": task.metric, "unit": task.unit, "higher_is_better": task.higher_is_better},
            "machine": machine(),
            "seed": seed,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "original": by_file["original"],
            "candidates": {runtime: by_file[name] for runtime, name in candidates.items()},
            "artifact": by_file["artifact"] | in_float,
            "agreement_with_torch": agreement_with_torch,
            **measured.latency_results(seconds),
            "peaks": multiply_peaks(installed_runtimes()) if latency else [],
            "test_images": len(test.images),
            "stages": [
                {**record.model_dump(exclude_unset=True), **by_stage.get(number, {})}
                for number, record in enumerate(records, 1)
            ],
            **data,
        }
    )
    return results, {name: measured.predictions[name] for name in compared}


def _measured(
    files: Mapping[str, File],
    sessions: Mapping[str, Session],
    candidates: Mapping[str, str],
    test: Batches,
    target: Target,
    task: Task,
    seconds: float | None,
    progress: ProgressReporter,
) -> MeasuredFiles:
    """Run all files on the test set, then time them if there are `seconds` for it."""
    progress.start("test set in the runtime", len(files))
    predictions: dict[str, Any] = {}
    for name, file in files.items():
        # in a session of its own: a session keeps the memory of its largest batch until it is closed
        predictions[name] = file_predictions(file.open(), arrays(test, target.input), task)
        progress.advance()
    image, timings = next(arrays(test, target.input))[:1], None
    if seconds is not None:
        progress.say("latency: interleaved rounds, batch " + ", ".join(map(str, BATCH_SIZES)))
        timings = _timed(files, list(candidates.values()), image, seconds)
    targets = predictions["original"] if task.from_original else targets_of(test)
    return MeasuredFiles(files, sessions, candidates, predictions, timings, targets, task, image)


def _add_candidates(files: dict[str, File], sessions: dict[str, Session]) -> dict[str, str]:
    """Add the original file in every installed runtime at its default precision; return their names by runtime."""
    names: dict[str, str] = {}
    original, reference = files["original"], sessions["original"]
    for runtime in installed_runtimes():
        candidate = replace(original, runtime=runtime, precision=None)
        session = candidate.open()
        same = (session.runtime, session.precision) == (reference.runtime, reference.precision)
        names[runtime] = "original" if same else runtime
        if not same:
            files[runtime], sessions[runtime] = candidate, session
    return names


def _timed(files: Mapping[str, File], candidates: Sequence[str], image: Array, seconds: float) -> Timings:
    """Time all files until the speedups of the artifact over original and baseline have narrow intervals."""

    def wanted(timings: Timings, size: int) -> list[Ratio]:
        references = ("original", timings.fastest(candidates, size))
        return [timings.ratio(name, "artifact", size) for name in references]

    return measure_latency({name: each.open for name, each in files.items()}, image, ratios=wanted, seconds=seconds)
