"""Measure the files of a run in the runtimes: accuracy on the whole test set, and interleaved latency.

The baseline of a batch size is the candidate with the lowest median in the same rounds that its ratio is computed from.
Choosing among several candidates favors a lucky one, so the speedup over the baseline is, if anything, underestimated.
"""

from __future__ import annotations

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
from tersor.deploy.float_operators import float_operators
from tersor.evaluation.costs import FLOAT_BITS, Costs, agreement, costs
from tersor.evaluation.costs import predictions as torch_predictions
from tersor.evaluation.latency import (
    BATCH_SIZES,
    Array,
    compressed_bytes,
    footprint,
    measure_latency,
    predictions,
    size_bytes,
)
from tersor.evaluation.results import VERSION, Results, StageRecord
from tersor.evaluation.session import Session, installed_runtimes, open_session
from tersor.evaluation.timings import NARROW, Ratio, Timings

_HALF_BITS = 16


@dataclass(frozen=True)
class Contender:
    """A file measured in a runtime, and the costs of its network."""

    path: Path
    runtime: str
    precision: Literal["float32"] | None
    costs: Costs

    def open(self) -> Session:
        """Open a session."""
        return open_session(self.path, self.runtime, precision=self.precision)


def arrays(batches: Batches, input_kind: str) -> Iterator[Array]:
    """The images in the input format of a file: normalized float32, or uint8 pixels."""
    if input_kind == "normalized":
        for batch in batches:
            yield np.ascontiguousarray(batch.images.numpy())
    else:
        for index in torch.arange(len(batches.images)).split(batches.batch_size):
            yield batches.images.take(index).numpy()


def measure(
    original: nn.Module,
    model: nn.Module,
    folder: Path,
    test: Batches,
    target: Target,
    *,
    seed: int,
    progress: ProgressReporter,
    records: Sequence[StageRecord] = (),
    stages: Mapping[int, tuple[nn.Module, Path]] | None = None,
    seconds: float = 10.0,
    **data: Any,
) -> tuple[Results, dict[str, Array]]:
    """Measure the original, the baseline candidates, the artifact, and the files after each stage.

    Args:
        original: the network before compression.
        model: the compressed network in torch.
        folder: contains `original.onnx` and `model.onnx`.
        test: the whole test set, in order.
        target: the runtime to measure in.
        seed: the seed of the recipe.
        progress: reports the progress.
        records: records of the stages, which are completed with the measurements.
        stages: by number of a stage except the last: the network after it, and its file.
        seconds: time limit for the latency of one batch size.
        data: `mean`, `std` and `classes` of the data, for the results.

    Returns:
        The results, and the predicted classes (N,) of the original, the candidates and the artifact.
    """
    example = next(iter(test)).images[:1].contiguous()
    contenders = {
        "original": Contender(folder / "original.onnx", target.runtime, "float32", costs(original, example)),
        "artifact": Contender(folder / "model.onnx", target.runtime, None, costs(model, example)),
    }
    sessions = {name: contender.open() for name, contender in contenders.items()}
    candidates: dict[str, str] = {}
    for runtime, candidate in _candidates(contenders["original"]).items():
        session = candidate.open()
        candidates[runtime] = "original" if _alike(session, sessions["original"]) else runtime
        if candidates[runtime] == runtime:
            contenders[runtime], sessions[runtime] = candidate, session
    entries = list(contenders)
    names = {number: f"stage {number}" for number in stages or {}}
    for number, (network, path) in (stages or {}).items():
        contenders[names[number]] = Contender(path, target.runtime, None, costs(network, example))
        sessions[names[number]] = contenders[names[number]].open()
    progress.start("test set in the runtime", len(contenders) + 1)
    answers: dict[str, Array] = {}
    for name, session in sessions.items():
        answers[name] = predictions(session, arrays(test, target.input))
        progress.advance()
    in_torch = torch_predictions(model, test)
    progress.advance()
    progress.say("latency: interleaved rounds, batch " + ", ".join(map(str, BATCH_SIZES)))
    pixels = next(arrays(test, target.input))[:1]
    timings = _timed(contenders, list(candidates.values()), pixels, seconds)
    labels = test.images.labels
    measured = {
        name: _entry(contenders[name], sessions[name], answers, name, labels, timings, pixels) for name in entries
    }
    of_stages = {
        number: _stage_results(contenders[name], answers[name], labels, timings, name) for number, name in names.items()
    }
    of_stages[len(records)] = _stage_results(contenders["artifact"], answers["artifact"], labels, timings, "artifact")
    in_float, warning = float_operators(model, example)
    if warning is not None:
        progress.say(f"warning: {warning}")
    fastest = {size: timings.fastest(candidates.values(), size) for size in BATCH_SIZES}
    numbers = {
        "version": VERSION,
        "runtime": target.runtime,
        "target": target,
        "machine": machine(),
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "original": measured["original"],
        "candidates": {runtime: measured[name] for runtime, name in candidates.items()},
        "baseline": {
            str(size): {key: measured[name][key] for key in ("runtime", "precision")} for size, name in fastest.items()
        },
        "artifact": measured["artifact"] | in_float,
        "agreement_with_torch": agreement(torch.from_numpy(answers["artifact"]), in_torch),
        "speedup": {
            "original": _speedups(timings, dict.fromkeys(BATCH_SIZES, "original"), "artifact"),
            "baseline": _speedups(timings, fastest, "artifact"),
        },
        "rounds": {
            "time_limit_seconds": seconds,
            "interval_width": NARROW,
            "ended_by": {str(size): reason for size, reason in timings.ended_by.items()},
        },
        "test_images": len(labels),
        "stages": [
            {**record.model_dump(exclude_unset=True), **of_stages.get(number, {})}
            for number, record in enumerate(records, 1)
        ],
        **data,
    }
    return Results.model_validate(numbers), {name: answers[name] for name in entries}


def _candidates(original: Contender) -> dict[str, Contender]:
    """The original file in every installed runtime at its default precision."""
    return {runtime: replace(original, runtime=runtime, precision=None) for runtime in installed_runtimes()}


def _timed(contenders: Mapping[str, Contender], candidates: Sequence[str], image: Array, seconds: float) -> Timings:
    """Time all files until the speedups of the artifact over original and baseline have narrow intervals."""

    def wanted(timings: Timings, size: int) -> list[Ratio]:
        references = ("original", timings.fastest(candidates, size))
        return [timings.ratio(name, "artifact", size) for name in references]

    return measure_latency(
        {name: each.open for name, each in contenders.items()}, image, ratios=wanted, seconds=seconds
    )


def _alike(one: Session, other: Session) -> bool:
    return (one.runtime, one.precision) == (other.runtime, other.precision)


def _stage_results(
    contender: Contender, answers: Array, labels: torch.Tensor, timings: Timings, name: str
) -> dict[str, Any]:
    return {
        "accuracy": agreement(torch.from_numpy(answers), labels),
        "bytes": size_bytes(contender.path),
        "compressed_bytes": compressed_bytes(contender.path),
        "macs": contender.costs.macs,
        "sparsity": contender.costs.sparsity,
        "latency_ms": {str(size): asdict(timings.spread(name, size)) for size in BATCH_SIZES},
        "speedup": _speedups(timings, dict.fromkeys(BATCH_SIZES, "original"), name),
    }


def _entry(
    contender: Contender,
    session: Session,
    answers: dict[str, Array],
    name: str,
    labels: torch.Tensor,
    timings: Timings,
    example: Array,
) -> dict[str, Any]:
    answer = torch.from_numpy(answers[name])
    spent = footprint(contender.path, contender.runtime, example, precision=contender.precision)
    return {
        "runtime": contender.runtime,
        "precision": session.precision,
        "batch": session.batch,
        "accuracy": agreement(answer, labels),
        "agreement": agreement(answer, torch.from_numpy(answers["original"])),
        "bytes": size_bytes(contender.path),
        "compressed_bytes": compressed_bytes(contender.path),
        "parameters": contender.costs.parameters,
        "macs": contender.costs.macs,
        "bit_operations": _bit_operations(contender.costs, session.precision),
        "sparsity": contender.costs.sparsity,
        "masked": contender.costs.masked,
        "peak_memory_bytes": spent.peak_memory_bytes,
        "load_ms": spent.load_ms,
        "latency_ms": {str(size): asdict(timings.spread(name, size)) for size in BATCH_SIZES},
        "latency_runs_ms": {str(size): timings.groups[name][size] for size in BATCH_SIZES},
    }


def _bit_operations(counted: Costs, precision: str) -> int:
    """Bit operations of the network; of a float network, at the precision that the runtime executes."""
    in_float = counted.bit_operations == counted.macs * FLOAT_BITS**2
    return counted.macs * _HALF_BITS**2 if in_float and precision != "float32" else counted.bit_operations


def _speedups(timings: Timings, slow: Mapping[int, str], fast: str) -> dict[str, Any]:
    """By batch size: latency of `slow` over that of `fast`, with a 95 % interval."""
    return {str(size): asdict(timings.ratio(name, fast, size)) for size, name in slow.items()}
