"""Existing artifacts: the metric on a test set (`tersor eval`) and interleaved latency (`tersor bench`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from tersor.checkpoint.artifact import read_artifact
from tersor.core.errors import InputError
from tersor.core.progress import ProgressReporter
from tersor.deploy.file_layers import file_layers
from tersor.evaluation.latency import BATCH_SIZES, measure_latency, size_bytes
from tersor.evaluation.results import Reference
from tersor.evaluation.session import Array, Session, installed_runtimes, open_session
from tersor.evaluation.timings import EndedBy, Ratio, Spread, Timings
from tersor.pipeline.artifact_settings import (
    class_names,
    data_source,
    normalization_line,
    numbers_of,
    original_file,
    refuse_other_classes,
    task_of_artifact,
)

_CHANNELS = (1, 3, 4)
_COMPUTED = "computed from the training images, since the file has none; they must be those of its training"
_MOST_BITS = 8
"""Of a quantized weight."""


@dataclass(frozen=True)
class Evaluation:
    """The metric on the test images, and the runtime that it was measured in.

    Attributes:
        bits: stored bits of the quantized weights; empty for a float file.
        precision: of all else.
    """

    metric: str
    score: float
    shown: str
    images: int
    runtime: str
    precision: str
    bits: tuple[int, ...] = ()

    def __str__(self) -> str:
        """ "91.20 % of 360 test images, onnxruntime in 8 bits (the rest in float32)"."""
        score = f"{self.shown} of" if self.metric == "accuracy" else f"{self.metric} {self.shown} on"
        bits = " and ".join(map(str, self.bits))
        precision = f"{bits} bits (the rest in {self.precision})" if bits else self.precision
        return f"{score} {self.images} test images, {self.runtime} in {precision}"


def evaluate(
    artifact: Path, data: str | None, runtime: str | None, task: str | None = None, *, progress: ProgressReporter
) -> Evaluation:
    """Measure the metric of `artifact` on the test images of `data`.

    Args:
        artifact: the folder of a run, or an ONNX file.
        data: an image folder, a CSV file or the name of a data set; by default the data of the folder's recipe.
        runtime: by default that of the folder's recipe, else ONNX Runtime.
        task: its name; by default that of the folder's recipe, else classification.
        progress: reports the progress.

    Raises:
        InputError: the artifact or the data cannot be used, or an ONNX file is given without data.
    """
    from tersor.data import Batches, load
    from tersor.evaluation.measurement import arrays
    from tersor.evaluation.scoring import file_predictions, images_at_once, score, targets_of

    found = read_artifact(artifact)
    numbers = numbers_of(found)
    session = open_session(found.model, runtime or numbers.get("runtime", "onnxruntime"))
    progress.say("reading the images")
    asked = task_of_artifact(found, task)
    options = data_source(found, data) | {key: numbers[key] for key in ("mean", "std") if key in numbers}
    channels = len(numbers["mean"]) if numbers.get("mean") else session.input_shape[1]
    if channels in _CHANNELS:
        options["channels"] = channels
    splits = load(**options, targets="boxes" if asked.boxes else "masks")
    refuse_other_classes(class_names(found.model), splits.classes)
    assert splits.mean is not None
    assert splits.std is not None
    batches = Batches(splits.test, images_at_once(asked, splits.test.size), mean=splits.mean, std=splits.std)
    kind = "uint8" if session.input_dtype == np.uint8 else "normalized"
    if kind == "normalized":
        source = "from the artifact" if numbers.get("mean") else _COMPUTED
        progress.say(normalization_line(splits.mean, splits.std, source))
    progress.start("test set", 1)
    predictions = file_predictions(session, arrays(batches, kind), asked)
    targets = targets_of(batches)
    if asked.from_original:
        original = original_file(found)
        targets = file_predictions(open_session(original, session.runtime), arrays(batches, kind), asked)
    progress.advance()
    result = score(asked, predictions, targets)
    shown, tested, bits = asked.shown(result), len(splits.test), _weight_bits(found.model)
    return Evaluation(asked.metric, result, shown, tested, session.runtime, session.precision, bits)


def _weight_bits(path: Path) -> tuple[int, ...]:
    """The stored bits of quantized weights, sorted."""
    if path.suffix != ".onnx":
        return ()
    return tuple(sorted({layer.bits for layer in file_layers(path) if layer.bits <= _MOST_BITS}))


@dataclass(frozen=True)
class _Contender:
    """A file in a runtime. `precision` None: the runtime's default; `executed`: the precision it then uses."""

    name: str
    path: Path
    runtime: str
    precision: Literal["float32"] | None
    executed: str

    @property
    def key(self) -> str:
        """Unique among all files."""
        return f"{self.name} in {self.runtime} in {self.precision or 'default'}"

    def open(self) -> Session:
        """Open a session."""
        return open_session(self.path, self.runtime, precision=self.precision)


@dataclass(frozen=True)
class _Family:
    """An original, its baseline candidates, and the artifacts made from it, each in every runtime."""

    original: _Contender
    candidates: Sequence[_Contender]
    artifacts: Sequence[_Contender]

    def contenders(self) -> list[_Contender]:
        """All of them, each once: a candidate may be the original itself."""
        return list(dict.fromkeys((self.original, *self.candidates, *self.artifacts)))

    def baseline(self, timings: Timings, size: int) -> _Contender:
        """The fastest candidate at a batch size."""
        key = timings.fastest([each.key for each in self.candidates], size)
        return next(each for each in self.candidates if each.key == key)

    def ratios(self, timings: Timings, size: int, artifact: _Contender) -> dict[Reference, Ratio]:
        """Speedups of an artifact over the original and over the baseline."""
        references: dict[Reference, _Contender] = {"original": self.original, "baseline": self.baseline(timings, size)}
        return {name: timings.ratio(each.key, artifact.key, size) for name, each in references.items()}


@dataclass(frozen=True)
class TimedFile:
    """The latency of a file in a runtime.

    Attributes:
        roles: whether it is the original, the baseline, or both.
        speedup: of an artifact over the original and over the baseline; empty for the original in any runtime.
    """

    file: str
    bytes: int
    runtime: str
    precision: str
    latency_ms: Spread
    roles: Sequence[Reference]
    speedup: Mapping[Reference, Ratio]


@dataclass(frozen=True)
class LatencyTable:
    """What `tersor bench` measures at a batch size.

    Attributes:
        batch_size, rounds, ended_by: as in `Timings`.
        files: every file in every runtime.
    """

    batch_size: int
    rounds: int
    ended_by: EndedBy
    files: Sequence[TimedFile]


def timed(artifacts: Sequence[Path], seconds: float) -> Iterator[LatencyTable]:
    """Time every file in every runtime, in interleaved rounds of one run.

    In a folder, the original is `original.onnx` in float32 in the recipe's runtime; among ONNX files it is the first.
    The baseline is the same file in the fastest runtime at its default precision.

    Args:
        artifacts: folders of runs, or ONNX files.
        seconds: time limit per batch size, as for `measure_latency`.

    Raises:
        InputError: an artifact cannot be read, opened or timed.
    """
    groups: dict[tuple[tuple[int | None, ...], str], list[_Family]] = {}
    bare: dict[tuple[tuple[int | None, ...], str], list[Path]] = {}
    for artifact in artifacts:
        found = read_artifact(artifact)
        if "original.onnx" in found.files:
            runtime = numbers_of(found).get("runtime", "onnxruntime")
            names = {f"{artifact}/{name}": found.files[name] for name in ("original.onnx", "model.onnx")}
            groups.setdefault(_images(found.model), []).append(_family(names, runtime))
        else:
            bare.setdefault(_images(found.model), []).append(found.model)
    for images, paths in bare.items():
        groups.setdefault(images, []).append(_family({str(path): path for path in paths}, "onnxruntime"))
    for (shape, dtype), families in groups.items():
        if not all(isinstance(size, int) for size in shape):
            name = families[0].original.name
            raise InputError(f"{name} accepts images of any size. Export it for a fixed size to time it.")
        yield from _tables(families, np.zeros((1, *shape), dtype), seconds)  # type: ignore[arg-type]


def _images(path: Path) -> tuple[tuple[int | None, ...], str]:
    """Shape (C, H, W) and data type of a file's input."""
    session = open_session(path, "onnxruntime")
    return session.input_shape[1:], str(session.input_dtype)


def _family(files: Mapping[str, Path], runtime: str) -> _Family:
    """The first file is the original, in `runtime`; the others are artifacts."""

    def contender(name: str, each: str, precision: Literal["float32"] | None = None) -> _Contender:
        executed = open_session(files[name], each, precision=precision).precision
        return _Contender(name, files[name], each, precision, executed)

    first, *others = files
    installed, original = installed_runtimes(), contender(first, runtime, "float32")
    candidates = [contender(first, each) for each in installed]
    return _Family(
        original,
        [original if (each.runtime, each.executed) == (runtime, "float32") else each for each in candidates],
        [contender(name, each) for name in others for each in installed],
    )


def _tables(families: Sequence[_Family], example: Array, seconds: float) -> Iterator[LatencyTable]:
    def compared(timings: Timings, size: int) -> list[Ratio]:
        return [
            ratio
            for family in families
            for artifact in family.artifacts
            for ratio in family.ratios(timings, size, artifact).values()
        ]

    openers = {each.key: each.open for family in families for each in family.contenders()}
    timings = measure_latency(openers, example, ratios=compared, seconds=seconds)
    for size in BATCH_SIZES:
        files = [each for family in families for each in _timed_files(family, timings, size)]
        rounds = timings.spread(families[0].original.key, size).n
        yield LatencyTable(size, rounds, timings.ended_by[size], files)


def _timed_files(family: _Family, timings: Timings, size: int) -> Iterator[TimedFile]:
    baseline = family.baseline(timings, size)
    for each in family.contenders():
        spread = timings.spread(each.key, size)
        speedup = family.ratios(timings, size, each) if each in family.artifacts else {}
        references: dict[Reference, _Contender] = {"original": family.original, "baseline": baseline}
        roles: list[Reference] = [name for name, reference in references.items() if reference == each]
        yield TimedFile(each.name, size_bytes(each.path), each.runtime, each.executed, spread, roles, speedup)
