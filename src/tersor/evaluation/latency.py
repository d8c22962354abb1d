"""Answers, latency, size and memory of files in the runtimes that will serve them. Needs numpy, never torch.

**Latency is interleaved.** A machine's speed drifts by more than two contenders differ. So every round gives each
contender one turn, in a new order, and what is compared are the times of the same round. After some rounds all files
are opened anew: two sessions of one file differ for as long as they are open (see `timings.py`).

**What disturbs whom.** Between two requests ONNX Runtime's threads spin for the next, on cores that another contender
needs. ResNet-20, FP32 and int8, in both runtimes, four contenders interleaved against each alone in its process, median
of 40 turns at batch 1 (AMD EPYC with AVX2, 2 threads on 2 idle cores, ONNX Runtime 1.32, OpenVINO 2026.4):

    as it comes                            OpenVINO 1.34 and 1.58 times slower than alone, ONNX Runtime 1.0 to 1.2
    session.intra_op.allow_spinning = 0    ONNX Runtime 1.27 times slower, OpenVINO 1.01
    session.force_spinning_stop = 1        all four at most 1.02

The last is fair to both, so `runtime.py` sets it: threads spin within a request and stop with it. The first run of a
turn is slower still (1.07 times when idle, 1.5 when not: caches, sleeping threads), so it is not counted. Where runs
are short a turn times several and its median counts. A pause between turns made everything slower.
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
from tersor.evaluation.process_footprint import Footprint
from tersor.evaluation.session import Array, Session
from tersor.evaluation.timings import NARROW, EndedBy, Ratio, Timings

BATCH_SIZES = (1, 32, 128)

_FEWEST_GROUPS = 8
_MOST_ROUNDS_A_GROUP = 20
_GROUPS_IN_TIME = 12
_LONGEST_TURN_MS = 10.0
_MOST_RUNS_A_TURN = 5


def predictions(session: Session, arrays: Iterable[Array]) -> Array:
    """The class with the largest logit, (N,) int64, of all images of `arrays`, each (B, C, H, W); of a network with one
    logit, class 1 where that is above 0.

    Raises:
        InputError: the images do not fit the network, its output is not logits (B, classes), several outputs could be
            the logits, or a single output could be a logit or a probability.
    """
    if session.logits is None:
        raise InputError(
            f"the file has the outputs {', '.join(session.outputs)}, and it cannot be told which one is the logits. "
            "Return them under the key 'logits', or the logits alone, and export again."
        )
    answers: list[Array] = [np.empty(0, np.int64)]
    for array in arrays:
        logits = session.run(array)
        if logits.ndim != 2 or len(logits) != len(array):
            raise InputError(
                f"a classifier answers {len(array)} images with logits ({len(array)}, classes); this network "
                f"answered with shape {logits.shape}."
            )
        answers.append(_of_one_logit(logits[:, 0]) if logits.shape[1] == 1 else logits.argmax(axis=1))
    return np.concatenate(answers)


def _of_one_logit(logits: Array) -> Array:
    """Class 1 where the only logit (N,) is above 0."""
    if ((logits >= 0) & (logits <= 1)).all():
        raise InputError(
            "the network has one output for each image, all between 0 and 1: logits, or probabilities behind a "
            "sigmoid? Export it with two logits, one for each class, or without the sigmoid."
        )
    return (logits > 0).astype(np.int64)


def measure_latency(
    contenders: Mapping[str, Callable[[], Session]],
    example: Array,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    ratios: Callable[[Timings, int], Iterable[Ratio]] | None = None,
    seconds: float = 30.0,
) -> Timings:
    """Times `contenders` against each other, interleaved, until their ratios are known well enough.

    Args:
        contenders: by name, a function that opens a session.
        example: one image (1, C, H, W), repeated to fill a batch.
        batch_sizes: images a batch.
        ratios: from what was timed so far and a batch size, the ratios that are wanted; by default those of every
            contender against the first. A batch size ends when all their intervals are narrower than 10 %.
        seconds: or when it has taken this long, opening included, but not before eight groups of rounds.

    Raises:
        InputError: a file cannot be opened, or a network does not take the example, or not a batch of that size.
    """
    assert contenders, "nothing to time"
    assert len(example) == 1, "one image"
    names = list(contenders)
    ratios = ratios or (lambda timings, size: [timings.ratio(name, names[0], size) for name in names[1:]])
    rounds = {size: _Rounds(np.repeat(example, size, axis=0), names, seconds) for size in batch_sizes}
    timings = Timings({name: {size: each.groups[name] for size, each in rounds.items()} for name in names}, {})
    generator = np.random.default_rng(0)
    openings, turns = _orders(names, generator), _orders(names, generator)
    while running := [each for each in rounds.values() if each.ended_by is None]:
        start = time.perf_counter()
        sessions = {name: contenders[name]() for name in next(openings)}
        opening = time.perf_counter() - start
        for each in running:
            each.take(sessions, turns, opening / len(running))
        sessions.clear()  # before the next ones are opened
        for size, each in rounds.items():
            each.end(partial(ratios, timings, size))
    return replace(timings, ended_by={size: each.ended_by for size, each in rounds.items()})


def _orders(names: Sequence[str], generator: np.random.Generator) -> Iterator[Sequence[str]]:
    """Orders by chance, each followed by its reverse, so that of any two names each comes first equally often."""
    while True:
        order: list[str] = generator.permutation(np.array(names)).tolist()
        yield order
        yield order[::-1]


class _Rounds:
    """The rounds of one batch size, group by group.

    Attributes:
        groups: milliseconds by contender, group and round.
        ended_by: why there are no more, once there are none.
    """

    def __init__(self, batch: Array, names: Sequence[str], seconds: float) -> None:
        self.batch = np.ascontiguousarray(batch)
        self.groups: dict[str, list[list[float]]] = {name: [] for name in names}
        self.ended_by: EndedBy | None = None
        self._seconds = seconds
        self._spent = 0.0
        self._runs = 0
        self._rounds = 0

    def take(self, sessions: Mapping[str, Session], orders: Iterable[Sequence[str]], opening: float) -> None:
        """Takes one group of rounds with `sessions`, which took `opening` seconds to open."""
        start = time.perf_counter()
        for session in sessions.values():
            session.run(self.batch)  # checks the batch, and warms up
        if not self._rounds:
            self._fit(sessions)
        for taken in self.groups.values():
            taken.append([])
        for _, order in zip(range(self._rounds), orders, strict=False):
            for name in order:
                self.groups[name][-1].append(_turn(sessions[name], self.batch, self._runs))
        self._spent += opening + time.perf_counter() - start

    def _fit(self, sessions: Mapping[str, Session]) -> None:
        """How many runs fit a turn, the same number for all, and how many rounds fit a group."""
        warm = [_turn(session, self.batch, runs=2) for session in sessions.values()]
        self._runs = int(np.clip(_LONGEST_TURN_MS / max(warm), 1, _MOST_RUNS_A_TURN))
        milliseconds = sum(warm) * (1 + self._runs)
        fitting = 1000 * self._seconds / _GROUPS_IN_TIME / milliseconds
        self._rounds = int(np.clip(fitting, 1, _MOST_ROUNDS_A_GROUP))

    def end(self, ratios: Callable[[], Iterable[Ratio]]) -> None:
        """Decides whether there are more, by the ratios that are wanted."""
        if self.ended_by or len(next(iter(self.groups.values()))) < _FEWEST_GROUPS:
            return
        if all(ratio.width < NARROW for ratio in ratios()):
            self.ended_by = "interval"
        elif self._spent > self._seconds:
            self.ended_by = "time"


def _turn(session: Session, batch: Array, runs: int) -> float:
    """Median of `runs` runs in milliseconds, after one that is not counted."""
    infer = session.infer
    infer(batch)
    taken: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        infer(batch)
        taken.append(1000 * (time.perf_counter() - start))
    return float(np.median(taken))


def footprint(
    path: Path | str,
    runtime: str,
    example: Array,
    *,
    precision: str | None = None,
    threads: int | None = None,
) -> Footprint:
    """Load time and memory of a file, measured in a fresh process that holds nothing else (see `footprint.py`).

    Args:
        path, runtime, precision, threads: as for `open_session`.
        example: one image (1, C, H, W); only its shape and type matter.

    Raises:
        InputError: as `open_session` does.
        subprocess.CalledProcessError: the process died, for instance because memory ran out.
    """
    question = {
        "path": str(path),
        "runtime": runtime,
        "precision": precision,
        "threads": threads,
        "shape": example.shape,
        "dtype": str(example.dtype),
    }
    command = [sys.executable, "-P", "-m", "tersor.evaluation.process_footprint", json.dumps(question)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command, child.stdout, child.stderr)
    answer = json.loads(child.stdout)
    if "refused" in answer:
        raise InputError(answer["refused"])
    return Footprint(**answer)


def size_bytes(path: Path | str) -> int:
    """Bytes of every file that the runtime needs: an `.onnx` with its external data, an `.xml` with its `.bin`.

    Raises:
        InputError: one of them is missing, or the `.onnx` file is damaged.
    """
    return sum(file.stat().st_size for file in _files(Path(path)))


def compressed_bytes(path: Path | str) -> int:
    """Bytes of the same files once each is deflated, as zip and gzip and most servers do (zlib, level 6).

    Zeros that a file stores in full, as under a mask, take next to nothing here.

    Raises:
        InputError: as `size_bytes`.
    """
    return sum(_deflated(file) for file in _files(Path(path)))


def _deflated(file: Path) -> int:
    deflate = zlib.compressobj()
    with file.open("rb") as opened:
        written = sum(len(deflate.compress(chunk)) for chunk in iter(partial(opened.read, 1 << 20), b""))
    return written + len(deflate.flush())


def _files(path: Path) -> list[Path]:
    """Every file that the runtime needs."""
    if not path.is_file():
        raise InputError(f"there is no file {path}.")
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path, *_external_data(path)]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{path} needs {', '.join(missing)}, which is not there.")
    return files


def _external_data(path: Path) -> set[Path]:
    import onnx  # here, because it takes longer to import than all the rest
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except DecodeError as error:
        raise InputError(f"{path} is not an ONNX file, or a damaged one: {error}") from error
    constants = [attribute.t for node in graph.node for attribute in node.attribute]
    return {
        path.parent / entry.value
        for tensor in (*graph.initializer, *constants)
        for entry in tensor.external_data
        if entry.key == "location"
    }
