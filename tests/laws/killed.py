"""A tiny run in a child process that is killed, or whose disk fails, and then resumed in a new process."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
from safetensors.torch import load_file

from tersor.checkpoint.artifact import read_artifact

PHASES = ("teacher", "before the first step", "training", "checkpoint", "export", "measuring", "writing")
EPOCH = 8  # steps
LONGEST = 600  # seconds, for a run on a busy machine
RECIPE = """\
model: {name: "tiny:build"}
teacher: {name: "tiny:build", epochs: 3, training: {batch_size: 32}}
data: {name: digits, limit: 128, augment: flip}
checkpoint_every: 1
stages:
  - {name: cut, methods: [{channel_pruning: {keep_macs: 0.6, round_to: 4, estimation_images: 64}}]}
  - name: train
    steps: STEPS
    batch_size: 16
    validate_every: 1
    ema: 0.9
    optimizer: {name: adamw, learning_rate: 0.001}
    methods:
      - {weight_pruning: {sparsity: 0.8, sparsity_schedule: cubic, every: 8}}
      - {qat: {calibration_images: 32}}
      - soft_targets
      - {factor_transfer: {paraphraser_epochs: 2, paraphraser_learning_rate: 0.01}}
"""
NETWORK = """\
from torch import nn

def build(num_classes):
    def conv(width, into):
        return nn.Conv2d(width, into, 3, padding=1, bias=False), nn.BatchNorm2d(into), nn.ReLU()
    return nn.Sequential(*conv(3, 16), *conv(16, 16), nn.Dropout(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(16, num_classes))
"""


@dataclass(frozen=True)
class Whole:
    """The files of an uninterrupted run, and the duration of its phases."""

    out: Path
    seconds: Mapping[str, float]
    writes: int
    largest: int


def prepare(folder: Path, steps: int) -> None:
    """Write the recipe and the network into an existing folder."""
    (folder / "recipe.yaml").write_text(RECIPE.replace("STEPS", str(steps)))
    (folder / "tiny.py").write_text(NETWORK)


def start(folder: Path, out: Path, *fault: object) -> Any:
    """Start or resume a run into `out` in a child process.

    Args:
        folder: folder of the recipe.
        out: output folder.
        fault: EROFS or ENOSPC and the number of writes before it, or EFBIG and the largest file size in bytes.
    """
    return forked.start(_run, folder, out, *fault)


def _run(*arguments: Any) -> None:
    import killed_child  # here, so that the test process does not import it

    killed_child.run(*arguments)


def finish(folder: Path, out: Path) -> str:
    """Run or resume to the end, and return the standard output."""
    child = start(folder, out)
    child.join(LONGEST)
    assert child.exitcode == 0, errors_of(out)
    return out.with_name(f"{out.name}.out").read_text()


def errors_of(out: Path) -> str:
    """Standard error of the last process that ran into `out`."""
    return out.with_name(f"{out.name}.err").read_text()


def whole(folder: Path, name: str = "whole") -> Whole:
    """Run to the end, if that has not been done yet."""
    out, log = folder / name, folder / f"{name}.log"
    if not log.exists():
        shutil.rmtree(out, ignore_errors=True)
        _phases(out).unlink(missing_ok=True)
        log.write_text(finish(folder, out))
    largest = max(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Whole(out, _seconds(_phases(out)), int(log.read_text().split()[-1]), largest)


def kill(folder: Path, out: Path, phase: str, seconds: float) -> str:
    """Kill a run after some seconds in a phase; return the phase in which it was killed, or "ended"."""
    _phases(out).unlink(missing_ok=True)
    child = start(folder, out)
    while child.is_alive() and _seconds(_phases(out), until=time.monotonic()).get(phase, -1.0) < seconds:
        time.sleep(0.001)
    child.kill()
    child.join()
    marks = _phases(out).read_text().splitlines() if _phases(out).exists() else []
    return "ended" if out.exists() and not _checkpoints(out).exists() else _phase(marks)


def require_same(folder: Path, expected: Whole, out: Path) -> None:
    """Resume the run into `out`, compare its files bit for bit with the uninterrupted run, and delete it."""
    finish(folder, out)
    for name in ("model.safetensors", "model.onnx", "original.onnx", "structure.json", "recipe.yaml"):
        assert (read_artifact(out).files[name]).read_bytes() == (expected.out / name).read_bytes(), name
    ours, theirs = _weights(out), _weights(expected.out)
    assert ours.keys() == theirs.keys()
    for stage, tensors in ours.items():
        assert tensors.keys() == theirs[stage].keys()
        assert all(value.equal(theirs[stage][key]) for key, value in tensors.items()), stage
    assert stage_records(out) == stage_records(expected.out)
    assert not _checkpoints(out).exists()
    shutil.rmtree(out)


def require_nothing_half_written(out: Path, child: Any) -> None:
    """The run ended with one error message and exit code 2, and left only the files that it can be resumed from."""
    child.join(LONGEST)
    errors = errors_of(out)
    assert child.exitcode == 2, errors[-3000:]
    messages = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, errors
    assert "Traceback" not in errors, errors
    assert not out.exists()
    left = {path.name for path in out.parent.iterdir() if path.name.startswith((out.name, f".{out.name}"))}
    assert left <= {f"{out.name}.{suffix}" for suffix in ("checkpoints", "phases", "out", "err")}, left


def fault_of(expected: Whole, draw: random.Random) -> tuple[str, int]:
    """A random fault: a disk that is full or read-only after some writes, or full in the middle of a file."""
    kind = draw.choice(("ENOSPC", "EROFS", "EFBIG"))
    return kind, draw.randrange(expected.largest if kind == "EFBIG" else expected.writes)


def remove(out: Path) -> None:
    """Delete all files of a run into `out`."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(_checkpoints(out), ignore_errors=True)
    for suffix in ("phases", "out", "err"):
        out.with_name(f"{out.name}.{suffix}").unlink(missing_ok=True)


def stage_records(out: Path) -> list[dict[str, Any]]:
    """The records of all stages, without times."""
    *_, end = sorted((out / "checkpoints").iterdir())
    stages = json.loads((end / "clock.json").read_text())["record"]["stages"]
    for stage in stages:
        stage.pop("minutes")
        stage.pop("training_seconds", None)
    return stages


def _weights(out: Path) -> dict[str, dict[str, Any]]:
    """Tensors at the end of each stage, by stage."""
    return {
        path.name.rsplit("-", 1)[0]: load_file(path / "tensors.safetensors")
        for path in sorted((out / "checkpoints").iterdir())
    }


def _phases(out: Path) -> Path:
    return out.with_name(f"{out.name}.phases")


def _checkpoints(out: Path) -> Path:
    return out.with_name(f"{out.name}.checkpoints")


def _seconds(file: Path, until: float | None = None) -> dict[str, float]:
    """Seconds of a process in each phase."""
    marks = [line.split(" ", 1) for line in file.read_text().splitlines()] if file.exists() else []
    ends = [float(time_) for time_, _ in marks[1:]] + [until or float(marks[-1][0])] * bool(marks)
    found: dict[str, float] = {}
    for (begun, phase), end in zip(marks, ends, strict=True):
        found[phase] = found.get(phase, 0.0) + end - float(begun)
    return found


def _phase(marks: list[str]) -> str:
    return marks[-1].split(" ", 1)[1] if marks else "start"
