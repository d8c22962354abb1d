"""What a network, its original and its artifact are worth, measured: `numbers.json`.

Everything under `original`, `bf16` and `artifact` is of the file, in the runtime: accuracy over the whole test set,
latency interleaved in one run. `bf16` is the original in OpenVINO's half-width floats, which cost nothing where the
processor has them; where it has none, OpenVINO computes in float32, and `precision` says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.core.target import Target
from tersor.core.watch import Watch
from tersor.data import Batches
from tersor.export.bench import (
    BATCH_SIZES,
    Array,
    Timings,
    compressed_bytes,
    footprint,
    latency,
    predictions,
    size_bytes,
)
from tersor.export.runtime import Session, load_runtime, machine, open_session
from tersor.measure import Costs, agreement, costs
from tersor.measure import predictions as torch_predictions

_AGAIN = "original, again"
OF_STAGES = ("accuracy", "bytes", "compressed_bytes", "macs", "sparsity", "latency_ms")
"""What is told of a stage, under the names that it has in every entry."""


@dataclass(frozen=True)
class Contender:
    """A file that is measured in a runtime, and the network that it was made from."""

    path: Path
    runtime: str
    precision: Literal["float32", "bfloat16"] | None
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


def openvino_installed() -> bool:
    """Whether the original can be measured in OpenVINO's own precision."""
    try:
        load_runtime("openvino")
    except InputError:
        return False
    return True


def measure(
    original: nn.Module,
    model: nn.Module,
    folder: Path,
    test: Batches,
    target: Target,
    *,
    seed: int,
    watch: Watch,
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
        watch: who looks on.
        stages: number of a stage but the last -> what it left, and the file of that.
        seconds: time for the latency of one batch size.
    """
    example = next(iter(test)).images[:1].contiguous()
    costs_of_original = costs(original, example)
    contenders = {
        "original": Contender(folder / "original.onnx", target.runtime, "float32", costs_of_original),
        "artifact": Contender(folder / "model.onnx", target.runtime, "float32", costs(model, example)),
    }
    if openvino_installed():
        contenders["bf16"] = Contender(folder / "original.onnx", "openvino", "bfloat16", costs_of_original)
    entries = list(contenders)
    left = {number: f"stage {number}" for number in stages or {}}
    for number, (network, path) in (stages or {}).items():
        contenders[left[number]] = Contender(path, target.runtime, "float32", costs(network, example))
    sessions = {name: contender.open() for name, contender in contenders.items()}
    watch.start("test set in the runtime", len(contenders) + 1)
    answers: dict[str, Array] = {}
    for name, session in sessions.items():
        answers[name] = predictions(session, arrays(test, target.input))
        watch.advance()
    in_torch = torch_predictions(model, test)
    watch.advance()
    watch.say("latency: every contender in turn, batch " + ", ".join(map(str, BATCH_SIZES)))
    pixels = next(arrays(test, target.input))[:1]
    timings = latency({**sessions, _AGAIN: contenders["original"].open()}, pixels, seconds=seconds)
    labels = test.images.labels
    measured = {
        name: _entry(contenders[name], sessions[name], answers, name, labels, timings, pixels) for name in entries
    }
    of_stages = {
        number: _of_stage(contenders[name], answers[name], labels, timings, name) for number, name in left.items()
    }
    numbers = {
        "runtime": target.runtime,
        "target": target.model_dump(),
        "machine": machine(),
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "original": measured["original"],
        "bf16": measured.get("bf16"),
        "artifact": measured["artifact"],
        "agreement_with_torch": agreement(torch.from_numpy(answers["artifact"]), in_torch),
        "speedup": _ratios(timings, "original", "artifact"),
        "noise_floor": _ratios(timings, "original", _AGAIN),
        "test_images": len(labels),
        "stages": of_stages,
    }
    return numbers, {name: answers[name] for name in entries}


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
    bits = 16 * 16 if session.precision == "bfloat16" else None
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
        "bit_operations": contender.costs.macs * bits if bits else contender.costs.bit_operations,
        "sparsity": contender.costs.sparsity,
        "masked": contender.costs.masked,
        "peak_memory_bytes": spent.peak_memory_bytes,
        "load_ms": spent.load_ms,
        "latency_ms": {str(size): asdict(timings.spread(name, size)) for size in BATCH_SIZES},
        "latency_runs_ms": {str(size): timings.rounds[name][size] for size in BATCH_SIZES},
    }


def _ratios(timings: Timings, contender: str, against: str) -> dict[str, Any]:
    return {str(size): asdict(timings.paired_ratio(contender, against, size)) for size in BATCH_SIZES}
