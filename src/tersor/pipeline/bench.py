"""Interleaved latency of existing artifacts (`tersor bench`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ConfigDict

from tersor.checkpoint.artifact import read_artifact
from tersor.core.errors import InputError
from tersor.deploy.file_layers import stored_precision
from tersor.evaluation.latency import BATCH_SIZES, measure_latency, size_bytes
from tersor.evaluation.session import Array, Session, installed_runtimes, open_session
from tersor.evaluation.timings import EndedBy, Ratio, Spread, Timings
from tersor.pipeline.artifact_settings import numbers_of

Compared = Literal["original", "baseline", "model", "first", "first_fastest"]
"""What a file is compared with. Files of a folder: the original and the baseline of the folder. ONNX files given with a
folder: these two and the folder's model.onnx. ONNX files given without a folder: the first of them, in ONNX Runtime and
in its fastest runtime."""

_Images = tuple[tuple[int | None, ...], str]
"""Shape (C, H, W) and data type of a file's input."""


@dataclass(frozen=True)
class _Contender:
    """A file in a runtime. `precision` None: the runtime's default; `executed`: the float precision it then uses."""

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
    """An original, its baseline candidates, and the artifacts made from it, each in every runtime.

    `bare`: they are ONNX files without a folder, of which the first takes the place of the original. `model`: the
    artifact of a folder, in the recipe's runtime, if ONNX files without a folder are compared with it.
    """

    original: _Contender
    candidates: Sequence[_Contender]
    artifacts: Sequence[_Contender]
    bare: bool
    model: _Contender | None = None

    def contenders(self) -> list[_Contender]:
        """All of them, each once: a candidate may be the original itself."""
        return list(dict.fromkeys((self.original, *self.candidates, *self.artifacts)))

    def baseline(self, timings: Timings, size: int) -> _Contender:
        """The fastest candidate at a batch size."""
        key = timings.fastest([each.key for each in self.candidates], size)
        return next(each for each in self.candidates if each.key == key)

    def references(self, timings: Timings, size: int) -> dict[Compared, _Contender]:
        """What the artifacts are compared with."""
        original, baseline = self.original, self.baseline(timings, size)
        if self.bare:
            return {"first": original, "first_fastest": baseline}
        model: dict[Compared, _Contender] = {} if self.model is None else {"model": self.model}
        return {"original": original, "baseline": baseline, **model}

    def ratios(self, timings: Timings, size: int, artifact: _Contender) -> dict[Compared, Ratio]:
        """Speedups of an artifact over what it is compared with."""
        found = self.references(timings, size)
        return {name: timings.ratio(each.key, artifact.key, size) for name, each in found.items() if each != artifact}


@dataclass(frozen=True)
class TimedFile:
    """The latency of a file in a runtime."""

    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True)
    file: str
    """Path of the file."""
    bytes: int
    """Size of the file, in bytes."""
    runtime: str
    """Runtime of the measurement."""
    precision: str
    """Data type of the weights, and of products that are not quantized, such as `int8, rest float32`."""
    latency_ms: Spread
    """Latency of one batch."""
    roles: Sequence[Compared]
    """The references that this file is: `original`, `baseline` or `model` (the artifact) of a folder; without a folder,
    `first` or `first_fastest` (the first ONNX file in its fastest runtime)."""
    speedup: Mapping[Compared, Ratio]
    """Latency of each reference divided by that of the file; empty for the original, or the first file."""


@dataclass(frozen=True)
class LatencyTable:
    """What `tersor bench` measures at a batch size."""

    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True)
    batch_size: int
    """Number of images in a batch."""
    rounds: int
    """Number of interleaved rounds."""
    ended_by: EndedBy
    """What ended the measurement: narrow intervals, or the time limit."""
    files: Sequence[TimedFile]
    """Every file in every runtime."""
    images: str
    """Data type and shape of the images that the files take: `float32 images of 3 x 32 x 32`."""


def timed(artifacts: Sequence[Path], seconds: float) -> Iterator[LatencyTable]:
    """Time every file in every runtime, in interleaved rounds of one run.

    In a folder, the original is `original.onnx` in float32 in the recipe's runtime, and the baseline is the same file
    in the fastest runtime at its default precision. ONNX files without a folder are compared with the original, the
    baseline and the artifact of the first folder for the same images. Without such a folder, they are compared with the
    first of them.

    Args:
        artifacts: folders of runs, or ONNX files; a second mention of one is ignored.
        seconds: time limit per batch size, as for `measure_latency`.

    Raises:
        InputError: an artifact cannot be read, opened or timed.
    """
    for images, families in _families({each.resolve(): each for each in artifacts}.values()).items():
        shape, dtype = images
        if not all(isinstance(size, int) for size in shape):
            name = families[0].original.name
            raise InputError(f"{name} accepts images of any size. Export it for a fixed size to time it.")
        yield from _tables(families, np.zeros((1, *shape), dtype), seconds)  # type: ignore[arg-type]


def _families(artifacts: Iterable[Path]) -> dict[_Images, list[_Family]]:
    """The families of all files, by the images that the files take."""
    folders: dict[_Images, list[tuple[Mapping[str, Path], str]]] = {}
    bare: dict[_Images, dict[str, Path]] = {}
    for artifact in artifacts:
        found = read_artifact(artifact)
        if artifact.is_dir() and "original.onnx" in found.files:
            names = {str(found.files[name]): found.files[name] for name in ("original.onnx", "model.onnx")}
            runtime = numbers_of(found).get("runtime", "onnxruntime")
            folders.setdefault(_images(found.model), []).append((names, runtime))
        else:
            bare.setdefault(_images(found.model), {})[str(found.model)] = found.model
    families: dict[_Images, list[_Family]] = {}
    for images, (first, *others) in folders.items():
        beside = _not_in(first[0], bare.pop(images, {}))
        families[images] = [_family(*first, beside), *(_family(*each, {}) for each in others)]
    for images, files in bare.items():
        families[images] = [_family(files, "onnxruntime", None)]
    return families


def _not_in(folder: Mapping[str, Path], files: Mapping[str, Path]) -> dict[str, Path]:
    """Those of the files that are not files of the folder."""
    own = {path.resolve() for path in folder.values()}
    return {name: path for name, path in files.items() if path.resolve() not in own}


def _images(path: Path) -> _Images:
    session = open_session(path, "onnxruntime")
    return session.input_shape[1:], str(session.input_dtype)


def _family(files: Mapping[str, Path], runtime: str, beside: Mapping[str, Path] | None) -> _Family:
    """The first file is the original, in `runtime`; the others are artifacts.

    `beside`: files without a folder that are compared with those of this folder; None if `files` have no folder.
    """
    every = {**files, **(beside or {})}

    def contender(name: str, each: str, precision: Literal["float32"] | None = None) -> _Contender:
        executed = open_session(every[name], each, precision=precision).precision
        return _Contender(name, every[name], each, precision, executed)

    first, *others = every
    installed, original = installed_runtimes(), contender(first, runtime, "float32")
    candidates = [contender(first, each) for each in installed]
    artifacts = [contender(name, each) for name in others for each in installed]
    return _Family(
        original,
        [original if (each.runtime, each.executed) == (runtime, "float32") else each for each in candidates],
        artifacts,
        bare=beside is None,
        model=next(each for each in artifacts if each.runtime == runtime) if beside else None,
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
    shape = " x ".join(map(str, example.shape[1:]))
    for size in BATCH_SIZES:
        files = [each for family in families for each in _timed_files(family, timings, size)]
        rounds = timings.spread(families[0].original.key, size).n
        yield LatencyTable(size, rounds, timings.ended_by[size], files, f"{example.dtype} images of {shape}")


def _timed_files(family: _Family, timings: Timings, size: int) -> Iterator[TimedFile]:
    references = family.references(timings, size)
    for each in family.contenders():
        spread = timings.spread(each.key, size)
        speedup = family.ratios(timings, size, each) if each in family.artifacts else {}
        roles: list[Compared] = [name for name, reference in references.items() if reference == each]
        precision = stored_precision(each.path, each.executed)
        yield TimedFile(each.name, size_bytes(each.path), each.runtime, precision, spread, roles, speedup)
