"""The child process of `killed.py`: a run that records its phases, and whose disk may fail.

The fork server imports this module, so that slow imports happen once.
"""

from __future__ import annotations

import errno
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime  # noqa: F401
import onnxscript  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch
from torch import nn

import decomposed_once
import tersor.pipeline.run  # noqa: F401
from tersor.checkpoint import store
from tersor.core.errors import InputError
from tersor.deploy.onnx import export
from tersor.evaluation.process_footprint import Footprint
from tersor.pipeline import stages

decomposed_once.pytest_configure()
torch.set_num_threads(1)  # deterministic order of sums, and no threads when the process forks
with tempfile.TemporaryDirectory() as _folder:  # torch imports most of its exporter on the first export
    export(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)).eval(), torch.zeros(1, 3, 1, 1), Path(_folder) / "a.onnx")


def run(folder: Path, out: Path, *fault: Any) -> None:
    """Start or resume the run into `out`; see `killed.start`."""
    os.chdir(folder)
    sys.path.append(str(folder))
    for stream, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(out.with_name(f"{out.name}.{suffix}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    module = sys.modules["tersor.pipeline.run"]
    _skip_slow_parts(module)
    _mark_phases(module, out.with_name(f"{out.name}.phases"))
    writes = _Writes(out, *fault)
    sys.addaudithook(writes.audit)
    if fault[:1] == ("EFBIG",):
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault[1], resource.RLIM_INFINITY))
    try:
        module.run(folder / "recipe.yaml", out=out, resume=True)
    except InputError as error:
        os.write(2, f"error: {error}\n".encode())
        sys.exit(2)
    os.write(1, f"writes {writes.count}\n".encode())


def _skip_slow_parts(module: Any) -> None:
    """Skip parts that take time and have no state to resume: second runtime, stage files, footprint processes."""
    sys.modules["tersor.evaluation.measurement"].installed_runtimes = lambda: ["onnxruntime"]
    sys.modules["tersor.evaluation.latency"]._MIN_GROUPS = 2
    module.stage_models = lambda *_arguments: {}
    empty = Footprint(peak_memory_bytes=0, load_ms=0.0)
    sys.modules["tersor.evaluation.measurement"].footprint = lambda *_arguments, **_options: empty
    measure = module.measure
    module.measure = lambda *arguments, **options: measure(*arguments, **options, seconds=0.02)


def _mark_phases(module: Any, file: Path) -> None:
    phases = file.open("a", buffering=1)
    inside = ["other"]

    def enter(phase: str) -> None:
        inside.append(phase)
        phases.write(f"{time.monotonic()} {phase}\n")

    def marked(phase: str, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            enter("teacher" if phase == "training" and inside[-1] == "teacher" else phase)
            try:
                return function(*arguments, **options)
            finally:
                inside.pop()
                enter(inside.pop())

        setattr(owner, name, call)

    marked("teacher", module, "train_teacher")
    marked("before the first step", stages, "attach")
    marked("before the first step", stages, "_begin")
    marked("training", stages, "fit")
    marked("checkpoint", store.Checkpoints, "save")
    marked("export", module, "export")
    marked("measuring", module, "measure")
    marked("measuring", module, "collect_evidence")
    marked("writing", module, "write_folder")


class _Writes:
    """Counts writes for `out`, and fails them from some write on: files that Python opens, creates or renames, and the
    checkpoints, which are not written by Python.
    """

    def __init__(self, out: Path, kind: str = "", after: int = 0) -> None:
        self.count = 0
        self._out, self._kind, self._after = out, kind, after
        save_file = store.save_file

        def saved(tensors: Any, path: Path) -> None:
            self._write(path)
            save_file(tensors, path)

        store.save_file = saved

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook."""
        named = event == "open" and isinstance(arguments[0], str | os.PathLike)
        opened = named and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        removed = event in ("os.remove", "os.rmdir")  # a full disk allows these, a read-only one does not
        if opened or event in ("os.mkdir", "os.rename") or (removed and self._kind == "EROFS"):
            self._write(arguments[0])

    def _write(self, path: Any) -> None:
        name = str(self._out)
        if not str(path).startswith((f"{name}.checkpoints", f"{name}/", f"{self._out.parent}/.{self._out.name}.")):
            return
        self.count += 1
        if self._kind in ("ENOSPC", "EROFS") and self.count > self._after:
            number = getattr(errno, self._kind)
            raise OSError(number, os.strerror(number), str(path))
