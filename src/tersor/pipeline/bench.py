"""Interleaved latency of existing artifacts (`tersor bench`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ConfigDict

from tersor.checkpoint.artifact import read_artifact
from tersor.core.errors import InputError
from tersor.core.files import sha256
from tersor.deploy.file_layers import stored_precision
from tersor.evaluation.latency import BATCH_SIZES, measure_latency, model_files, size_bytes
from tersor.evaluation.session import Array, Session, installed_runtimes, open_session
from tersor.evaluation.timings import EndedBy, Ratio, Spread, Timings
from tersor.pipeline.artifact_settings import numbers_of

Compared = Literal["original", "baseline", "model", "first", "first_fastest"]
"""What a file is compared with. Files of a folder: the original and the baseline of the folder; if other folders or
ONNX files are given too, also the first folder's model.onnx. ONNX files given with a folder: these three of the first
folder. ONNX files given without a folder: the first of them, in ONNX Runtime and in its fastest runtime."""

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
class _Folder:
    """A folder: its original, or the same file of another folder; its artifact; the runtime of its recipe. `copy`: see
    `_Family`."""

    original: Path
    model: Path
    runtime: str
    copy: str | None

    @property
    def files(self) -> dict[str, Path]:
        """Both files by their names."""
        return {str(each): each for each in (self.original, self.model)}


@dataclass(frozen=True)
class _Family:
    """An original, its baseline candidates, and the artifacts made from it, each in every runtime.

    `bare`: they are ONNX files without a folder, of which the first takes the place of the original. `model`: the
    artifact of the first folder, in its recipe's runtime, if other artifacts are compared with it. `copy`: the path of
    the folder's original, if a file with the same content is timed in its place.
    """

    original: _Contender
    candidates: Sequence[_Contender]
    artifacts: Sequence[_Contender]
    bare: bool
    model: _Contender | None = None
    copy: str | None = None

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
    """Data type of the stored weights, and of the products that stay in float, such as `int8, rest float32`."""
    latency_ms: Spread
    """Latency of one batch."""
    roles: Sequence[Compared]
    """The references that this file serves as: `original` or `baseline` of a folder, or `model` (the artifact of the
    first folder); without a folder, `first` (the first ONNX file in ONNX Runtime) or `first_fastest` (the same file in
    its fastest runtime)."""
    speedup: Mapping[Compared, Ratio]
    """Latency of each reference divided by that of the file; empty for the original, or the first file."""
    copies: Sequence[str] = ()
    """Paths of identical originals in other folders, which are not timed again."""


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
    in the fastest runtime at its default precision. Originals with the same content are timed once. ONNX files without
    a folder are compared with the original and the baseline of the first folder for the same images. These files, and
    the artifacts of the other folders, are also compared with the artifact of the first folder. Without such a folder,
    ONNX files are compared with the first of them.

    Args:
        artifacts: folders of runs or searches, or ONNX files; duplicates are ignored.
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
    folders: dict[_Images, list[_Folder]] = {}
    bare: dict[_Images, dict[str, Path]] = {}
    originals: dict[tuple[str, ...], Path] = {}
    for artifact in artifacts:
        found = read_artifact(artifact)
        if artifact.is_dir() and "original.onnx" in found.files:
            original, model = found.files["original.onnx"], found.files["model.onnx"]
            same = originals.setdefault(tuple(sha256(each) for each in model_files(original)), original)
            runtime = numbers_of(found).get("runtime", "onnxruntime")
            copy = None if same == original else str(original)
            folders.setdefault(_images(found.model), []).append(_Folder(same, model, runtime, copy))
        else:
            bare.setdefault(_images(found.model), {})[str(found.model)] = found.model
    families: dict[_Images, list[_Family]] = {}
    for images, given in folders.items():
        own = [path.resolve() for path in (given[0].original, given[0].model)]
        beside = {name: path for name, path in bare.pop(images, {}).items() if path.resolve() not in own}
        families[images] = _of_folders(given, beside)
    for images, files in bare.items():
        families[images] = [_family(files, "onnxruntime", bare=True)]
    return families


def _of_folders(folders: Sequence[_Folder], beside: Mapping[str, Path]) -> list[_Family]:
    """The families of folders. `beside`: files without a folder, compared with those of the first folder."""
    families = [
        replace(
            _family({**each.files, **({} if number else beside)}, each.runtime, bare=False),
            copy=each.copy,
        )
        for number, each in enumerate(folders)
    ]
    if len(folders) == 1 and not beside:
        return families
    model = next(each for each in families[0].artifacts if each.runtime == folders[0].runtime)
    return [replace(each, model=model) for each in families]


def _images(path: Path) -> _Images:
    session = open_session(path, "onnxruntime")
    return session.input_shape[1:], str(session.input_dtype)


def _family(files: Mapping[str, Path], runtime: str, *, bare: bool) -> _Family:
    """The first file is the original, in `runtime`; the others are artifacts. `bare`: they have no folder."""

    def contender(name: str, each: str, precision: Literal["float32"] | None = None) -> _Contender:
        executed = open_session(files[name], each, precision=precision).precision
        return _Contender(name, files[name], each, precision, executed)

    def candidate(each: str) -> _Contender:
        """The original in a runtime; not in its default precision if that is float32, which may be timed already."""
        found = contender(first, each)
        return replace(found, precision="float32") if found.executed == "float32" else found

    first, *others = files
    installed = installed_runtimes()
    artifacts = [contender(name, each) for name in others for each in installed]
    return _Family(contender(first, runtime, "float32"), list(map(candidate, installed)), artifacts, bare)


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
        rounds = timings.spread(families[0].original.key, size).n
        images = f"{example.dtype} images of {shape}"
        yield LatencyTable(size, rounds, timings.ended_by[size], _timed_files(families, timings, size), images)


def _timed_files(families: Sequence[_Family], timings: Timings, size: int) -> list[TimedFile]:
    """Every file in every runtime once; an original of several folders has the roles that it has in each of them."""
    roles: dict[_Contender, dict[Compared, None]] = {}
    speedup: dict[_Contender, dict[Compared, Ratio]] = {}
    for family in families:
        references = family.references(timings, size)
        for each in family.contenders():
            own = roles.setdefault(each, {})
            own.update(dict.fromkeys(name for name, reference in references.items() if reference == each))
            if each in family.artifacts:
                speedup[each] = family.ratios(timings, size, each)
    copies = {
        original: [each.copy for each in families if each.copy and each.original.path == original]
        for original in {each.original.path for each in families}
    }
    return [
        TimedFile(
            each.name,
            size_bytes(each.path),
            each.runtime,
            stored_precision(each.path, each.executed),
            timings.spread(each.key, size),
            list(own),
            speedup.get(each, {}),
            copies.get(each.path, ()),
        )
        for each, own in roles.items()
    ]
