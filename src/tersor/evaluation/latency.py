"""Latency, size and memory of model files in their target runtimes. Needs numpy, never torch.

**Latency is interleaved.** The speed of a machine drifts by more than the difference between two models. So every round
times each model once, in a new order, and ratios compare times of the same round. After some rounds all files are
opened again, since two sessions of one file differ as long as they are open (see `timings.py`).

**Spinning threads.** Between two requests, ONNX Runtime's threads spin on cores that another session needs. ResNet-20,
FP32 and int8, in both runtimes; four interleaved sessions against each alone in its process, median of 40 measurements
at batch 1 (AMD EPYC with AVX2, 2 threads on 2 idle cores, ONNX Runtime 1.32, OpenVINO 2026.4):

    default                                OpenVINO 1.34 and 1.58 times slower than alone, ONNX Runtime 1.0 to 1.2
    session.intra_op.allow_spinning = 0    ONNX Runtime 1.27 times slower, OpenVINO 1.01
    session.force_spinning_stop = 1        all four at most 1.02

The last is fair to both, so `session.py` sets it: threads spin during a request and stop afterwards. The first run
after another session is still slower (1.07 times when idle, 1.5 when not: caches, sleeping threads), so it is not
counted. For short runs a measurement is the median of several. A pause between measurements made everything slower.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from tersor.core.errors import InputError
from tersor.deploy.onnx_file import read_onnx
from tersor.evaluation.file_inputs import Array, FileArrays
from tersor.evaluation.process_footprint import Footprint
from tersor.evaluation.session import Session
from tersor.evaluation.timings import NARROW, EndedBy, Ratio, Timings

BATCH_SIZES = (1, 32, 128)

_MIN_GROUPS = 8
_MAX_ROUNDS_PER_GROUP = 20
_GROUPS_WITHIN_LIMIT = 12
_MAX_MEASUREMENT_MS = 10.0
_MAX_RUNS = 5


def measure_latency(
    openers: Mapping[str, Callable[[], Session]],
    example: FileArrays | Mapping[str, FileArrays],
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    ratios: Callable[[Timings, int], Iterable[Ratio]] | None = None,
    seconds: float = 30.0,
    least_groups: int | None = None,
) -> Timings:
    """Time models against each other, interleaved, until the intervals of their ratios are narrow.

    Args:
        openers: functions that open a session, by the model's name.
        example: one image (1, C, H, W), or one row of several inputs, repeated to fill a batch; by the model's name if
            the models differ in it.
        batch_sizes: images per batch.
        ratios: (timings so far, batch size) -> the ratios of interest; by default those of every model against the
            first. A batch size ends when all their intervals are narrower than 10 %.
        seconds: time limit of each batch size, opening included.
        least_groups: groups of rounds that are measured in any case, two or more; eight by default.

    Raises:
        InputError: a file cannot be opened, or a network does not accept the example or the batch size.
    """
    assert openers, "nothing to time"
    names = list(openers)
    examples = example if isinstance(example, Mapping) else dict.fromkeys(names, example)
    assert all(len(each) == 1 for each in examples.values()), "one image"
    ratios = ratios or (lambda timings, size: [timings.ratio(name, names[0], size) for name in names[1:]])
    rounds = {
        size: _Rounds(
            {name: each[np.zeros(size, np.int64)] for name, each in examples.items()},
            seconds,
            least_groups or _MIN_GROUPS,
        )
        for size in batch_sizes
    }
    timings = Timings({name: {size: each.groups[name] for size, each in rounds.items()} for name in names}, {})
    generator = np.random.default_rng(0)
    opening_orders, run_orders = _orders(names, generator), _orders(names, generator)
    while running := [each for each in rounds.values() if each.ended_by is None]:
        start = time.perf_counter()
        sessions = {name: openers[name]() for name in next(opening_orders)}
        opening = time.perf_counter() - start
        for each in running:
            each.measure_group(sessions, run_orders, opening / len(running))
        sessions.clear()  # closed before the next ones are opened
        for size, each in rounds.items():
            each.end_if_done(partial(ratios, timings, size))
    return replace(timings, ended_by={size: each.ended_by for size, each in rounds.items()})


def _orders(names: Sequence[str], generator: np.random.Generator) -> Iterator[Sequence[str]]:
    """Random orders, each followed by its reverse, so that each of two names comes first equally often."""
    while True:
        order: list[str] = generator.permutation(np.array(names)).tolist()
        yield order
        yield order[::-1]


class _Rounds:
    """The rounds of one batch size, group by group.

    Attributes:
        groups: milliseconds by model, group and round.
        ended_by: why the measurement ended; None while it runs.
    """

    def __init__(self, batches: Mapping[str, FileArrays], seconds: float, least_groups: int) -> None:
        self.batches = batches
        self.groups: dict[str, list[list[float]]] = {name: [] for name in batches}
        self.ended_by: EndedBy | None = None
        self._seconds = seconds
        self._least_groups = least_groups
        self._spent = 0.0
        self._runs = 0
        self._rounds = 0

    def measure_group(self, sessions: Mapping[str, Session], orders: Iterable[Sequence[str]], opening: float) -> None:
        """Measure one group of rounds with `sessions`, which took `opening` seconds to open."""
        start = time.perf_counter()
        for name, session in sessions.items():
            session.run(self.batches[name])  # checks the batch, and warms up
        if not self._rounds:
            self._plan(sessions)
        for groups in self.groups.values():
            groups.append([])
        for _, order in zip(range(self._rounds), orders, strict=False):
            for name in order:
                self.groups[name][-1].append(_time_runs(sessions[name], self.batches[name], self._runs))
        self._spent += opening + time.perf_counter() - start

    def _plan(self, sessions: Mapping[str, Session]) -> None:
        """Set the number of runs per measurement, the same for all models, and of rounds per group."""
        warm = [_time_runs(session, self.batches[name], runs=2) for name, session in sessions.items()]
        self._runs = int(np.clip(_MAX_MEASUREMENT_MS / max(warm), 1, _MAX_RUNS))
        milliseconds = sum(warm) * (1 + self._runs)
        rounds = 1000 * self._seconds / _GROUPS_WITHIN_LIMIT / milliseconds
        self._rounds = int(np.clip(rounds, 1, _MAX_ROUNDS_PER_GROUP))

    def end_if_done(self, ratios: Callable[[], Iterable[Ratio]]) -> None:
        """End the measurement when all `ratios` are narrow, or the time limit is reached."""
        if self.ended_by or len(next(iter(self.groups.values()))) < self._least_groups:
            return
        if all(ratio.width < NARROW for ratio in ratios()):
            self.ended_by = "interval"
        elif self._spent > self._seconds:
            self.ended_by = "time"


def _time_runs(session: Session, batch: FileArrays, runs: int) -> float:
    """Median of `runs` runs in milliseconds, after one uncounted run."""
    infer = session.infer
    infer(batch)
    milliseconds: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        infer(batch)
        milliseconds.append(1000 * (time.perf_counter() - start))
    return float(np.median(milliseconds))


def footprint(
    path: Path | str,
    runtime: str,
    example: Array,
    *,
    precision: str | None = None,
    threads: int | None = None,
) -> Footprint:
    """Load time and peak memory of a file, measured in a new process (see `process_footprint.py`).

    Args:
        path, runtime, precision, threads: as for `open_session`.
        example: one image (1, C, H, W); only its shape and type matter.

    Raises:
        InputError: as `open_session` does.
        subprocess.CalledProcessError: the process died, for example because memory ran out.
    """
    request = {
        "path": str(path),
        "runtime": runtime,
        "precision": precision,
        "threads": threads,
        "shape": example.shape,
        "dtype": str(example.dtype),
    }
    command = [sys.executable, "-P", "-m", "tersor.evaluation.process_footprint", json.dumps(request)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command, child.stdout, child.stderr)
    result = json.loads(child.stdout)
    if "error" in result:
        raise InputError(result["error"])
    return Footprint(**result)


def size_bytes(path: Path | str) -> int:
    """Bytes of all files of a model: an `.onnx` with its external data, an `.xml` with its `.bin`.

    Raises:
        InputError: one of them is missing, or the `.onnx` file is damaged.
    """
    return sum(file.stat().st_size for file in model_files(Path(path)))


def compressed_bytes(path: Path | str) -> int:
    """Bytes of the same files after compression with deflate, as in zip and gzip (zlib, level 6).

    Stored zeros, such as masked weights, take almost no space here.

    Raises:
        InputError: as `size_bytes`.
    """
    return sum(_deflated(file) for file in model_files(Path(path)))


def _deflated(file: Path) -> int:
    deflate = zlib.compressobj()
    with file.open("rb") as opened:
        written = sum(len(deflate.compress(chunk)) for chunk in iter(partial(opened.read, 1 << 20), b""))
    return written + len(deflate.flush())


def model_files(path: Path) -> list[Path]:
    """All files of a model.

    Raises:
        InputError: as `size_bytes`.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}.")
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path, *_external_data(path)]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"{path} needs other files, which are missing: {', '.join(missing)}. Copy them into its folder, or export "
            "the network again."
        )
    return files


def _external_data(path: Path) -> set[Path]:
    graph = read_onnx(path).graph
    constants = [attribute.t for node in graph.node for attribute in node.attribute]
    return {
        path.parent / entry.value
        for tensor in (*graph.initializer, *constants)
        for entry in tensor.external_data
        if entry.key == "location"
    }
