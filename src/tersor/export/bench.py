"""Answers, latency, size and memory of files in the runtimes that will serve them. Needs numpy, never torch.

**Latency is interleaved.** A machine's speed drifts by more than two contenders differ. So every round gives each
contender one turn, in a new order, and what is compared are the times of the same round (`paired_ratio`).

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tersor.core.errors import InputError
from tersor.export.footprint import Footprint
from tersor.export.runtime import Array, Session

BATCH_SIZES = (1, 32, 128)

_FEWEST_ROUNDS = 5
_LONGEST_TURN_MS = 10.0
_MOST_RUNS_A_TURN = 5


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of `n` values."""

    median: float
    p10: float
    p90: float
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        p10, median, p90 = np.percentile(values, (10, 50, 90)).tolist()
        return Spread(median, p10, p90, len(values))


@dataclass(frozen=True)
class Timings:
    """`rounds[contender][batch size]`: milliseconds a batch, one value a round, in the order they were taken."""

    rounds: Mapping[str, Mapping[int, Sequence[float]]]

    def spread(self, contender: str, batch_size: int) -> Spread:
        """Milliseconds a batch, over the rounds."""
        return Spread.of(self.rounds[contender][batch_size])

    def paired_ratio(self, contender: str, against: str, batch_size: int) -> Spread:
        """Time of `contender` over time of `against` in the same round; under 1 where `contender` is faster."""
        pairs = zip(self.rounds[contender][batch_size], self.rounds[against][batch_size], strict=True)
        return Spread.of([ours / theirs for ours, theirs in pairs])


def predictions(session: Session, arrays: Iterable[Array]) -> Array:
    """The class with the largest logit, (N,) int64, of all images of `arrays`, each (B, C, H, W); of a network with one
    logit, class 1 where that is above 0.

    Raises:
        InputError: the images do not fit the network, or it does not answer with logits (B, classes), or which of its
            outputs is the logits cannot be told, or whether one output is a logit or a probability.
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


def latency(
    contenders: Mapping[str, Session],
    example: Array,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    rounds: int = 60,
    seconds: float = 30.0,
) -> Timings:
    """Times `contenders` against each other, interleaved.

    Args:
        contenders: sessions by name. Two of the same file show what the machine's noise is.
        example: one image (1, C, H, W), repeated to fill a batch.
        batch_sizes: images a batch.
        rounds: turns of every contender at every batch size.
        seconds: a batch size that has taken this long gets no more rounds, once it has had five.

    Raises:
        InputError: a network does not take the example, or not a batch of that size.
    """
    assert contenders, "somebody has to run"
    assert len(example) == 1, "one image"
    assert rounds > 0, "at least once"
    times: dict[str, dict[int, Sequence[float]]] = {name: {} for name in contenders}
    for batch_size in batch_sizes:
        batch = np.ascontiguousarray(np.repeat(example, batch_size, axis=0))
        runs = _runs_a_turn(contenders.values(), batch)
        taken: dict[str, list[float]] = {name: [] for name in contenders}
        for order in _orders(list(contenders), rounds, seconds):
            for name in order:
                taken[name].append(_turn(contenders[name], batch, runs))
        for name, values in taken.items():
            times[name][batch_size] = values
    return Timings(times)


def _orders(names: list[str], rounds: int, seconds: float) -> Iterator[list[str]]:
    """Who comes after whom, anew for every round, until the time is up."""
    generator = np.random.default_rng(0)
    end = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= _FEWEST_ROUNDS and time.perf_counter() > end:
            return
        yield [names[place] for place in generator.permutation(len(names))]


def _runs_a_turn(sessions: Iterable[Session], batch: Array) -> int:
    """Warms every session up for this size, and says how many runs fit a turn: the same number for all."""
    warm: list[float] = []
    for session in sessions:
        session.run(batch)  # checks the batch
        warm.append(_turn(session, batch, runs=2))
    return int(np.clip(_LONGEST_TURN_MS / max(warm), 1, _MOST_RUNS_A_TURN))


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
    command = [sys.executable, "-P", "-m", "tersor.export.footprint", json.dumps(question)]
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
