"""The files of a run in their runtimes, and the fields of `numbers.json` that are measured for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tersor.deploy.file_layers import stored_precision, weight_bits
from tersor.evaluation.costs import FLOAT_BITS, Costs
from tersor.evaluation.latency import BATCH_SIZES, Array, compressed_bytes, footprint, size_bytes
from tersor.evaluation.scoring import agreement, score
from tersor.evaluation.session import Session, open_session
from tersor.evaluation.standard_error import error_of_drop, right_of, standard_error
from tersor.evaluation.timings import NARROW, Groups, Timings
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
class MeasuredFiles:
    """The measurements of all files, by name.

    Attributes:
        candidates: by runtime, the name of the original file at the default precision.
        predictions: predictions for the test images, as `task.predictions` returns them.
        timings: None if latency was not measured.
        targets: targets of the test images.
        example: one image in the input format of the files.
    """

    files: Mapping[str, File]
    sessions: Mapping[str, Session]
    candidates: Mapping[str, str]
    predictions: Mapping[str, Any]
    timings: Timings | None
    targets: Any
    task: Task
    example: Array

    def stage(self, name: str, before: str) -> dict[str, Any]:
        """The fields of a `StageRecord` that are measured; `before` is the file before the stage."""
        file = self.files[name]
        costs = {
            "score": score(self.task, self.predictions[name], self.targets),
            "bytes": size_bytes(file.path),
            "compressed_bytes": compressed_bytes(file.path),
            "macs": file.costs.macs,
            "sparsity": file.costs.sparsity,
        }
        if self.timings is None:
            return costs
        bits, bits_before = (weight_bits(self.files[each].path) for each in (name, before))
        found = {"speedup_of_quantization": self.speedups(self.timings, dict.fromkeys(BATCH_SIZES, before), name)}
        return (found if bits and bits != bits_before else {}) | {
            **costs,
            "latency_ms": self.spreads(name),
            "speedup": self.speedups(self.timings, dict.fromkeys(BATCH_SIZES, "original"), name),
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
            **self.scores(name),
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
            "latency_ms": self.spreads(name),
            "latency_runs_ms": {str(size): groups for size, groups in self.groups(name).items()},
        }

    def groups(self, name: str) -> Mapping[int, Groups]:
        """Milliseconds by batch size; empty if latency was not measured."""
        return {} if self.timings is None else self.timings.groups[name]

    def spreads(self, name: str) -> dict[str, Any]:
        """Median and percentiles by batch size; empty if latency was not measured."""
        if self.timings is None:
            return {}
        return {str(size): asdict(self.timings.spread(name, size)) for size in BATCH_SIZES}

    def scores(self, name: str) -> dict[str, Any]:
        """The score, with its standard error and that of its difference from the original if it is the accuracy."""
        found = score(self.task, self.predictions[name], self.targets)
        right, original = (right_of(self.task, self.predictions[each], self.targets) for each in (name, "original"))
        if right is None:
            return {"score": found}
        errors = {"score": found, "score_error": standard_error(found, len(right))}
        if name != "original":
            errors["difference_error"] = error_of_drop(right, original, found, len(right))
        return errors

    def precision(self, name: str) -> str:
        """What a file holds, and the float precision of the runtime."""
        return stored_precision(self.files[name].path, self.sessions[name].precision)

    @staticmethod
    def speedups(timings: Timings, slow: Mapping[int, str], fast: str) -> dict[str, Any]:
        """By batch size: latency of `slow` over that of `fast`, with a 95 % interval."""
        return {str(size): asdict(timings.ratio(name, fast, size)) for size, name in slow.items()}

    def latency_results(self, seconds: float) -> dict[str, Any]:
        """The fields of `Results` that compare the artifact with the original and the baseline."""
        timings = self.timings
        if timings is None:
            return {"latency_measured": False, "baseline": {}, "speedup": {}, "rounds": None}
        fastest = {size: timings.fastest(self.candidates.values(), size) for size in BATCH_SIZES}
        return {
            "latency_measured": True,
            "baseline": {
                str(size): {"runtime": self.files[name].runtime, "precision": self.precision(name)}
                for size, name in fastest.items()
            },
            "speedup": {
                "original": self.speedups(timings, dict.fromkeys(BATCH_SIZES, "original"), "artifact"),
                "baseline": self.speedups(timings, fastest, "artifact"),
            },
            "rounds": {
                "time_limit_seconds": seconds,
                "interval_width": NARROW,
                "ended_by": {str(size): reason for size, reason in timings.ended_by.items()},
            },
        }


def _bit_operations(counted: Costs, precision: str) -> int:
    """Bit operations of the network; of a float network, at the precision that the runtime executes."""
    in_float = counted.bit_operations == counted.macs * FLOAT_BITS**2
    return counted.macs * _HALF_BITS**2 if in_float and precision != "float32" else counted.bit_operations
