"""What a network, its original and its artifact are worth, measured: `numbers.json`.

Everything under `original`, `candidates` and `artifact` is of the file, in the runtime: accuracy over the whole test
set, latency interleaved in one run. `original` is float32 in the target runtime. `candidates` are what costs nothing:
the original file in every installed runtime, in the precision that the runtime chooses. The fastest of them is the
`baseline` of a batch size. It is chosen by its median from the rounds that the ratio to it is computed from: a choice
among several favours the one that was lucky, so the artifact's speedup over the baseline is, if anything, too small.
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
from tersor.evaluation.session import Session, installed_runtimes, open_session
from tersor.evaluation.timings import NARROW, Ratio, Timings

_HALF_BITS = 16

OF_STAGES = ("accuracy", "bytes", "compressed_bytes", "macs", "sparsity", "latency_ms")
"""What is told of a stage, under the names that it has in every entry."""


@dataclass(frozen=True)
class Contender:
    """A file that is measured in a runtime, and the network that it was made from."""

    path: Path
    runtime: str
    precision: Literal["float32"] | None
    costs: Costs

    def open(self) -> Session:
        """The file, ready to run."""
        return open_session(self.path, self.runtime, precision=self.precision)


def arrays(batches: Batches, input_kind: str) -> Iterator[Array]:
    """The images as a file takes them: normalised float32, or uint8 pixels."""
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
    stages: Mapping[int, tuple[nn.Module, Path]] | None = None,
    seconds: float = 10.0,
) -> tuple[dict[str, Any], dict[str, Array]]:
    """The content of `numbers.json`, and the answers (N,) of every file to the test images.

    Accuracy, bytes, latency, MACs and sparsity after a stage lie under `stages`, by its number.

    Args:
        original: the network as it came in.
        model: the compressed one, as torch has it.
        folder: holds `original.onnx` and `model.onnx`.
        test: the whole test set, in order.
        target: the runtime to measure in.
        seed: of the recipe.
        progress: reports the progress.
        stages: number of a stage but the last -> what it left, and the file of that.
        seconds: time for the latency of one batch size.
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
    left = {number: f"stage {number}" for number in stages or {}}
    for number, (network, path) in (stages or {}).items():
        contenders[left[number]] = Contender(path, target.runtime, None, costs(network, example))
        sessions[left[number]] = contenders[left[number]].open()
    progress.start("test set in the runtime", len(contenders) + 1)
    answers: dict[str, Array] = {}
    for name, session in sessions.items():
        answers[name] = predictions(session, arrays(test, target.input))
        progress.advance()
    in_torch = torch_predictions(model, test)
    progress.advance()
    progress.say("latency: every contender in turn, batch " + ", ".join(map(str, BATCH_SIZES)))
    pixels = next(arrays(test, target.input))[:1]
    timings = _timed(contenders, list(candidates.values()), pixels, seconds)
    labels = test.images.labels
    measured = {
        name: _entry(contenders[name], sessions[name], answers, name, labels, timings, pixels) for name in entries
    }
    of_stages = {
        number: _of_stage(contenders[name], answers[name], labels, timings, name) for number, name in left.items()
    }
    fastest = {size: timings.fastest(candidates.values(), size) for size in BATCH_SIZES}
    numbers = {
        "runtime": target.runtime,
        "target": target.model_dump(),
        "machine": machine(),
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "original": measured["original"],
        "candidates": {runtime: measured[name] for runtime, name in candidates.items()},
        "baseline": {
            str(size): {key: measured[name][key] for key in ("runtime", "precision")} for size, name in fastest.items()
        },
        "artifact": measured["artifact"],
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
        "stages": of_stages,
    }
    return numbers, {name: answers[name] for name in entries}


def _candidates(original: Contender) -> dict[str, Contender]:
    """Its file in every installed runtime, in the precision that the runtime chooses."""
    return {runtime: replace(original, runtime=runtime, precision=None) for runtime in installed_runtimes()}


def _timed(contenders: Mapping[str, Contender], candidates: Sequence[str], image: Array, seconds: float) -> Timings:
    """Latency of all, until it is known how the artifact compares with the original and the baseline."""

    def wanted(timings: Timings, size: int) -> list[Ratio]:
        references = ("original", timings.fastest(candidates, size))
        return [timings.ratio(name, "artifact", size) for name in references]

    return measure_latency(
        {name: each.open for name, each in contenders.items()}, image, ratios=wanted, seconds=seconds
    )


def _alike(one: Session, other: Session) -> bool:
    return (one.runtime, one.precision) == (other.runtime, other.precision)


def _of_stage(
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
    """As counted from the network; of one without a quantized layer, in the floats that are executed."""
    in_float = counted.bit_operations == counted.macs * FLOAT_BITS**2
    return counted.macs * _HALF_BITS**2 if in_float and precision != "float32" else counted.bit_operations


def _speedups(timings: Timings, slow: Mapping[int, str], fast: str) -> dict[str, Any]:
    """By batch size: time of `slow` over time of `fast`, with its 95 % interval."""
    return {str(size): asdict(timings.ratio(name, fast, size)) for size, name in slow.items()}
