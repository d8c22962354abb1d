"""Measure the files of a run in the runtimes: the metric on the whole test set, and interleaved latency.

The baseline of a batch size is the candidate with the lowest median in the same rounds that its ratio is computed from.
The minimum of several noisy medians is too low on average, so the speedup over the baseline is, if anything,
underestimated.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from tersor.core.machine import machine
from tersor.core.progress import ProgressReporter
from tersor.core.target import Target
from tersor.data import Batches
from tersor.deploy.file_layers import stored_precision, weight_bits
from tersor.deploy.float_operators import float_operators
from tersor.evaluation.costs import FLOAT_BITS, Costs, costs
from tersor.evaluation.latency import (
    BATCH_SIZES,
    Array,
    compressed_bytes,
    footprint,
    measure_latency,
    size_bytes,
)
from tersor.evaluation.multiply_peak import multiply_peaks
from tersor.evaluation.results import VERSION, Results, StageRecord
from tersor.evaluation.scoring import agreement, file_predictions, network_predictions, score, targets_of
from tersor.evaluation.session import Session, installed_runtimes, open_session
from tersor.evaluation.timings import NARROW, Ratio, Timings
from tersor.tasks.task import Task

_HALF_BITS = 16


@dataclass(frozen=True)
class File:
    """A file in a runtime, and the costs of its network."""

    path: Path
    runtime: str
    precision: Literal["float32"] | None
    costs: Costs

    def open(self) -> Session:
        """Open a session."""
        return open_session(self.path, self.runtime, precision=self.precision)


@dataclass(frozen=True)
class _Measured:
    """The measurements of all files, by name.

    Attributes:
        candidates: by runtime, the name of the original file at the default precision.
        predictions: predictions for the test images, as `task.predictions` returns them.
        targets: targets of the test images.
        example: one image in the input format of the files.
    """

    files: Mapping[str, File]
    sessions: Mapping[str, Session]
    candidates: Mapping[str, str]
    predictions: Mapping[str, Any]
    timings: Timings
    targets: Any
    task: Task
    example: Array

    def stage(self, name: str, before: str) -> dict[str, Any]:
        """The fields of a `StageRecord` that are measured; `before` is the file before the stage."""
        file = self.files[name]
        bits, bits_before = (weight_bits(self.files[each].path) for each in (name, before))
        found = {"speedup_of_quantization": self.speedups(dict.fromkeys(BATCH_SIZES, before), name)}
        return (found if bits and bits != bits_before else {}) | {
            "score": score(self.task, self.predictions[name], self.targets),
            "bytes": size_bytes(file.path),
            "compressed_bytes": compressed_bytes(file.path),
            "macs": file.costs.macs,
            "sparsity": file.costs.sparsity,
            "latency_ms": {str(size): asdict(self.timings.spread(name, size)) for size in BATCH_SIZES},
            "speedup": self.speedups(dict.fromkeys(BATCH_SIZES, "original"), name),
        }

    def file(self, name: str) -> dict[str, Any]:
        """The fields of a `FileResults`."""
        file, session = self.files[name], self.sessions[name]
        used = footprint(file.path, file.runtime, self.example, precision=file.precision)
        return {
            "runtime": file.runtime,
            "precision": self.precision(name),
            "float_precision": session.precision,
            "batch": session.batch,
            "score": score(self.task, self.predictions[name], self.targets),
            "agreement": agreement(self.task, self.predictions[name], self.predictions["original"]),
            "bytes": size_bytes(file.path),
            "compressed_bytes": compressed_bytes(file.path),
            "parameters": file.costs.parameters,
            "macs": file.costs.macs,
            "bit_operations": _bit_operations(file.costs, session.precision),
            "sparsity": file.costs.sparsity,
            "masked": file.costs.masked,
            "peak_memory_bytes": used.peak_memory_bytes,
            "load_ms": used.load_ms,
            "latency_ms": {str(size): asdict(self.timings.spread(name, size)) for size in BATCH_SIZES},
            "latency_runs_ms": {str(size): self.timings.groups[name][size] for size in BATCH_SIZES},
        }

    def precision(self, name: str) -> str:
        """What a file holds, and the float precision of the runtime."""
        return stored_precision(self.files[name].path, self.sessions[name].precision)

    def speedups(self, slow: Mapping[int, str], fast: str) -> dict[str, Any]:
        """By batch size: latency of `slow` over that of `fast`, with a 95 % interval."""
        return {str(size): asdict(self.timings.ratio(name, fast, size)) for size, name in slow.items()}

    def latency_results(self, seconds: float) -> dict[str, Any]:
        """The fields of `Results` that compare the artifact with the original and the baseline."""
        fastest = {size: self.timings.fastest(self.candidates.values(), size) for size in BATCH_SIZES}
        return {
            "baseline": {
                str(size): {"runtime": self.files[name].runtime, "precision": self.precision(name)}
                for size, name in fastest.items()
            },
            "speedup": {
                "original": self.speedups(dict.fromkeys(BATCH_SIZES, "original"), "artifact"),
                "baseline": self.speedups(fastest, "artifact"),
            },
            "rounds": {
                "time_limit_seconds": seconds,
                "interval_width": NARROW,
                "ended_by": {str(size): reason for size, reason in self.timings.ended_by.items()},
            },
        }


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
    measured = _measured(files, sessions, candidates, test, target, task, seconds, progress)
    agreement_with_torch = agreement(task, measured.predictions["artifact"], network_predictions(model, test, task))
    in_float, warning = float_operators(model, example)
    if warning is not None:
        progress.say(f"warning: {warning}")
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
            "peaks": multiply_peaks(installed_runtimes()),
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
    seconds: float,
    progress: ProgressReporter,
) -> _Measured:
    """Run all files on the test set, then time them."""
    progress.start("test set in the runtime", len(files))
    predictions: dict[str, Any] = {}
    for name, file in files.items():
        # in a session of its own: a session keeps the memory of its largest batch until it is closed
        predictions[name] = file_predictions(file.open(), arrays(test, target.input), task)
        progress.advance()
    progress.say("latency: interleaved rounds, batch " + ", ".join(map(str, BATCH_SIZES)))
    image = next(arrays(test, target.input))[:1]
    timings = _timed(files, list(candidates.values()), image, seconds)
    targets = predictions["original"] if task.from_original else targets_of(test)
    return _Measured(files, sessions, candidates, predictions, timings, targets, task, image)


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


def _bit_operations(counted: Costs, precision: str) -> int:
    """Bit operations of the network; of a float network, at the precision that the runtime executes."""
    in_float = counted.bit_operations == counted.macs * FLOAT_BITS**2
    return counted.macs * _HALF_BITS**2 if in_float and precision != "float32" else counted.bit_operations
