"""A tiny run in a process of its own, which is killed, or whose disk refuses, and which goes on in a fresh one."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tersor.export.artifact import read_artifact

PHASES = ("teacher", "before the first step", "training", "checkpoint", "export", "measuring", "writing")
EPOCH = 8  # steps
LONGEST = 600  # seconds of a run on a busy machine
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
_CHILD = """\
import errno, os, resource, sys, time
from pathlib import Path
from tersor import checkpoint, walk
from tersor.core.errors import InputError
from tersor.export.footprint import Footprint
import tersor.run
module = sys.modules["tersor.run"]
out, fault = Path(sys.argv[2]), sys.argv[4:]
for room in ("numbers", "evidence"):  # the second runtime adds time, and nothing to go on with
    sys.modules[f"tersor.export.{room}"].openvino_installed = lambda: False
walk.Walk.left_by_stages = lambda *_given: {}  # nor do files of every stage
nothing = Footprint(peak_memory_bytes=0, load_ms=0.0)
sys.modules["tersor.export.numbers"].footprint = lambda *_given, **_options: nothing  # nor fresh processes
measure = module.measure
module.measure = lambda *given, **options: measure(*given, **options, seconds=0.02)

phases = open(sys.argv[3], "a", buffering=1)
inside = ["other"]
def enter(phase):
    inside.append(phase)
    phases.write(f"{time.monotonic()} {phase}\\n")
def marked(phase, owner, name):
    function = getattr(owner, name)
    def call(*given, **options):
        enter(inside[-1] if phase == "training" and inside[-1] == "teacher" else phase)
        try:
            return function(*given, **options)
        finally:
            inside.pop()
            enter(inside.pop())
    setattr(owner, name, call)
marked("teacher", walk.Walk, "train_teacher")
marked("before the first step", walk.Walk, "attach")
marked("before the first step", walk, "_begin")
marked("training", walk, "fit")
marked("checkpoint", checkpoint.Checkpoints, "save")
marked("export", module, "export")
marked("measuring", module, "measure")
marked("measuring", module, "gather")
marked("writing", module, "write_folder")

writes = 0
def refuse(path):
    global writes
    if not str(path).startswith((f"{out}.", f"{out.parent}/.{out.name}.", f"{out}/")) and str(path) != str(out):
        return
    writes += 1
    if fault and fault[0] != "EFBIG" and writes > int(fault[1]):
        number = getattr(errno, fault[0])
        raise OSError(number, os.strerror(number), str(path))
def watch(event, given):
    made = event == "open" and isinstance(given[0], (str, os.PathLike)) and given[2] & (os.O_WRONLY | os.O_RDWR)
    removed = event in ("os.remove", "os.rmdir")  # which a full disk allows, and a read-only one does not
    if made or event in ("os.mkdir", "os.rename") or removed and fault[:1] == ["EROFS"]:
        refuse(given[0])
save_file = checkpoint.save_file
def saved(tensors, path):  # its own file is written beside Python's
    refuse(path)
    save_file(tensors, path)
checkpoint.save_file = saved
sys.addaudithook(watch)
if fault[:1] == ["EFBIG"]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault[1]), resource.RLIM_INFINITY))
try:
    module.run(Path(sys.argv[1]), out=out, resume=True)
except InputError as error:
    sys.stderr.write(f"error: {error}\\n")
    sys.exit(2)
sys.stdout.write(f"writes {writes}\\n")
"""


@dataclass(frozen=True)
class Whole:
    """What a run that nothing stopped has left, and how long each of its phases took."""

    out: Path
    seconds: Mapping[str, float]
    writes: int
    largest: int


def prepare(folder: Path, steps: int) -> None:
    """The recipe and the network, in a folder that is there."""
    (folder / "recipe.yaml").write_text(RECIPE.replace("STEPS", str(steps)))
    (folder / "tiny.py").write_text(NETWORK)


def start(folder: Path, out: Path, *fault: object) -> subprocess.Popen[str]:
    """A run into `out`, or one that goes on. A `fault` is EROFS or ENOSPC and the writes before it, or EFBIG and the
    bytes that a file may have.
    """
    command = [sys.executable, "-c", _CHILD, folder / "recipe.yaml", out, _phases(out), *map(str, fault)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, text=True)


def finish(folder: Path, out: Path) -> str:
    """Goes on to the end."""
    told, errors = (child := start(folder, out)).communicate(timeout=LONGEST)
    assert child.returncode == 0, errors
    return told


def whole(folder: Path, name: str = "whole") -> Whole:
    """Runs to the end, unless that was done before."""
    out, told = folder / name, folder / f"{name}.told"
    if not told.exists():
        shutil.rmtree(out, ignore_errors=True)
        _phases(out).unlink(missing_ok=True)
        told.write_text(finish(folder, out))
    largest = max(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Whole(out, _seconds(_phases(out)), int(told.read_text().split()[-1]), largest)


def kill(folder: Path, out: Path, phase: str, seconds: float) -> str:
    """Kills a run when it has been in a phase for so long; the phase that it was in then, "ended" where it was none."""
    _phases(out).unlink(missing_ok=True)
    child = start(folder, out)
    while child.poll() is None and _seconds(_phases(out), until=time.monotonic()).get(phase, -1.0) < seconds:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    marks = _phases(out).read_text().splitlines() if _phases(out).exists() else []
    return "ended" if out.exists() and not _checkpoints(out).exists() else _phase(marks)


def require_same(folder: Path, expected: Whole, out: Path) -> None:
    """The run into `out` has left what the whole one has, bit for bit; it is taken away then."""
    finish(folder, out)
    for name in ("model.safetensors", "model.onnx", "original.onnx", "structure.json", "recipe.yaml"):
        assert (read_artifact(out).files[name]).read_bytes() == (expected.out / name).read_bytes(), name
    ours, theirs = _weights(out), _weights(expected.out)
    assert ours.keys() == theirs.keys()
    for stage, tensors in ours.items():
        assert tensors.keys() == theirs[stage].keys()
        assert all(value.equal(theirs[stage][key]) for key, value in tensors.items()), stage
    assert told(out) == told(expected.out)
    assert not _checkpoints(out).exists()
    shutil.rmtree(out)


def require_nothing_half_written(out: Path, child: subprocess.Popen[str]) -> None:
    """It ended with one message and exit code 2, and beside what it goes on from lies nothing."""
    _, errors = child.communicate(timeout=LONGEST)
    assert child.returncode == 2, errors[-3000:]
    assert errors.startswith("error: "), errors
    assert errors.count("\n") == 1, errors
    assert not out.exists()
    mine = [path.name for path in out.parent.iterdir() if path.name.startswith((out.name, f".{out.name}"))]
    assert set(mine) <= {_checkpoints(out).name, _phases(out).name}, mine


def fault_of(expected: Whole, draw: random.Random) -> tuple[str, int]:
    """A disk that is full or read-only from a random write on, or full in the middle of a file."""
    kind = draw.choice(("ENOSPC", "EROFS", "EFBIG"))
    return kind, draw.randrange(expected.largest if kind == "EFBIG" else expected.writes)


def remove(out: Path) -> None:
    """All that a run into `out` has left."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(_checkpoints(out), ignore_errors=True)
    _phases(out).unlink(missing_ok=True)


def told(out: Path) -> list[dict[str, Any]]:
    """What the last stage's end tells of all stages, but for the clock."""
    *_, end = sorted((out / "checkpoints").iterdir())
    stages = json.loads((end / "clock.json").read_text())["told"]["stages"]
    return [{key: stage[key] for key in stage if key not in {"minutes", "training_seconds"}} for stage in stages]


def _weights(out: Path) -> dict[str, dict[str, Any]]:
    """Tensors of every stage's end, by stage."""
    return {
        path.name.rsplit("-", 1)[0]: load_file(path / "tensors.safetensors")
        for path in sorted((out / "checkpoints").iterdir())
    }


def _phases(out: Path) -> Path:
    return out.with_name(f"{out.name}.phases")


def _checkpoints(out: Path) -> Path:
    return out.with_name(f"{out.name}.checkpoints")


def _seconds(file: Path, until: float | None = None) -> dict[str, float]:
    """How long a process was in each phase."""
    marks = [line.split(" ", 1) for line in file.read_text().splitlines()] if file.exists() else []
    ends = [float(time_) for time_, _ in marks[1:]] + [until or float(marks[-1][0])] * bool(marks)
    found: dict[str, float] = {}
    for (begun, phase), end in zip(marks, ends, strict=True):
        found[phase] = found.get(phase, 0.0) + end - float(begun)
    return found


def _phase(marks: list[str]) -> str:
    return marks[-1].split(" ", 1)[1] if marks else "start"

