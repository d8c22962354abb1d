"""Artifacts that are there already: their accuracy on a test set, and their latency against each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from tersor.checkpoint.artifact import Artifact, read_artifact
from tersor.core.errors import InputError
from tersor.core.files import read_json
from tersor.core.import_path import is_function_path
from tersor.core.progress import ProgressReporter
from tersor.evaluation.latency import BATCH_SIZES, measure_latency, predictions, size_bytes
from tersor.evaluation.session import Array, Session, installed_runtimes, open_session
from tersor.evaluation.timings import EndedBy, Ratio, Timings
from tersor.report.verdict import difference

_BATCH = 500


@dataclass(frozen=True)
class Evaluation:
    """Percent of the test images that were told right, and where."""

    accuracy: float
    images: int
    runtime: str
    precision: str


def evaluate(artifact: Path, data: str | None, runtime: str | None, *, progress: ProgressReporter) -> Evaluation:
    """Runs `artifact` over the test images of `data`.

    Args:
        artifact: the folder of a run, or an ONNX file.
        data: an image folder or the name of a data set; of the folder's recipe by default.
        runtime: of the folder's recipe by default, else ONNX Runtime.
        progress: reports the progress.

    Raises:
        InputError: the artifact or the data cannot be used, or a bare file is given without data.
    """
    from tersor.data import Batches, load
    from tersor.evaluation.results import arrays

    found = read_artifact(artifact)
    numbers = _numbers(found)
    session = open_session(found.model, runtime or numbers.get("runtime", "onnxruntime"))
    progress.say("reading the images")
    options = _source(found, data) | {key: numbers[key] for key in ("mean", "std") if key in numbers}
    splits = load(**options)
    _refuse_other_classes(_classes(found.model), splits.classes)
    assert splits.mean is not None
    assert splits.std is not None
    batches = Batches(splits.test, _BATCH, mean=splits.mean, std=splits.std)
    kind = "uint8" if session.input_dtype == np.uint8 else "normalized"
    progress.start("test set", 1)
    answers = predictions(session, arrays(batches, kind))
    progress.advance()
    right = float((answers == splits.test.labels.numpy()).mean())
    return Evaluation(100 * right, len(answers), session.runtime, session.precision)


def _classes(model: Path) -> list[str] | None:
    """What the file's metadata says that its answers mean, in their order."""
    if model.suffix != ".onnx":
        return None
    import onnx  # here, because it takes longer to import than all the rest

    told = {entry.key: entry.value for entry in onnx.load(model, load_external_data=False).metadata_props}
    try:
        return TypeAdapter(list[str]).validate_json(told["classes"]) if "classes" in told else None
    except ValidationError as error:
        raise InputError(f"{model} names its classes in a way that cannot be read. Export it again.") from error


def _refuse_other_classes(of_artifact: Sequence[str] | None, of_data: Sequence[str]) -> None:
    if of_artifact is None or list(of_artifact) == list(of_data):
        return
    lacking, strange = (
        ", ".join(sorted(each)) for each in (set(of_artifact) - set(of_data), set(of_data) - set(of_artifact))
    )
    raise InputError(
        "the data has other classes than the artifact: "
        + "; ".join(
            [f"it lacks {lacking}"] * bool(lacking) + [f"the artifact knows no {strange}"] * bool(strange)
            or ["another order"]
        )
        + ". Give data with the same classes."
    )


class _Told(BaseModel):
    """What `numbers.json` says of how the network is run."""

    model_config = ConfigDict(allow_inf_nan=False)
    runtime: str = "onnxruntime"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


def _numbers(artifact: Artifact) -> dict[str, Any]:
    path = artifact.files.get("numbers.json")
    if path is None:
        return {}
    again = "Run its recipe.yaml again."
    try:
        return _Told.model_validate(read_json(path, again)).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise InputError(f"{path} is not what this version of tersor writes. {again}") from error


def _source(artifact: Artifact, data: str | None) -> dict[str, Any]:
    if data is not None:
        return {"folder": data} if Path(data).is_dir() else {"name": data}
    recipe = artifact.files.get("recipe.yaml")
    if recipe is None:
        raise InputError(f"{artifact.path} says nothing of its data. Write --data with an image folder, or a name.")
    from tersor.recipe import read

    source = read(recipe).data
    if source.name is not None and is_function_path(source.name):
        raise InputError(
            f"{artifact.path} takes its images from the function '{source.name}', and code that a folder names is not "
            f"run. Write --data {source.name} if it is yours."
        )
    return source.model_dump(exclude={"augment", "mean", "std"})


@dataclass(frozen=True)
class _Contender:
    """A file in a runtime; `precision` is None for the runtime's own choice, `executed` is what that is."""

    name: str
    path: Path
    runtime: str
    precision: Literal["float32"] | None
    executed: str

    @property
    def key(self) -> str:
        """Names it among all."""
        return f"{self.name} in {self.runtime} in {self.precision or 'default'}"

    def open(self) -> Session:
        """Ready to run."""
        return open_session(self.path, self.runtime, precision=self.precision)


@dataclass(frozen=True)
class _Family:
    """An original, the ways to run it that cost nothing, and what was made from it, each in every runtime."""

    original: _Contender
    candidates: Sequence[_Contender]
    artifacts: Sequence[_Contender]

    def contenders(self) -> list[_Contender]:
        """All of them; a candidate may be the original itself."""
        return list(dict.fromkeys((self.original, *self.candidates, *self.artifacts)))

    def baseline(self, timings: Timings, size: int) -> _Contender:
        """The fastest candidate at a batch size."""
        key = timings.fastest([each.key for each in self.candidates], size)
        return next(each for each in self.candidates if each.key == key)

    def ratios(self, timings: Timings, size: int, artifact: _Contender) -> list[Ratio]:
        """Of the original and of the baseline over an artifact."""
        references = (self.original, self.baseline(timings, size))
        return [timings.ratio(each.key, artifact.key, size) for each in references]


@dataclass(frozen=True)
class LatencyTable:
    """What `tersor bench` shows of a batch size.

    Attributes:
        batch_size, rounds, ended_by: as in `Timings`.
        rows: file, runtime and precision, milliseconds, speed against the original and against the baseline.
    """

    batch_size: int
    rounds: int
    ended_by: EndedBy
    rows: Sequence[tuple[str, ...]]


def timed(artifacts: Sequence[Path], seconds: float) -> Iterator[LatencyTable]:
    """Times every file in every runtime, all in one run, interleaved.

    Of a folder, `original.onnx` in float32 in the recipe's runtime is the original; of ONNX files the first is. The
    baseline is the fastest of the same file in every runtime at its default precision.

    Args:
        artifacts: folders of runs, or ONNX files.
        seconds: for each batch size, as for `measure_latency`.

    Raises:
        InputError: an artifact cannot be read, opened or timed.
    """
    groups: dict[tuple[tuple[int | None, ...], str], list[_Family]] = {}
    bare: dict[tuple[tuple[int | None, ...], str], list[Path]] = {}
    for artifact in artifacts:
        found = read_artifact(artifact)
        if "original.onnx" in found.files:
            runtime = _numbers(found).get("runtime", "onnxruntime")
            names = {f"{artifact}/{name}": found.files[name] for name in ("original.onnx", "model.onnx")}
            groups.setdefault(_images(found.model), []).append(_family(names, runtime))
        else:
            bare.setdefault(_images(found.model), []).append(found.model)
    for images, paths in bare.items():
        groups.setdefault(images, []).append(_family({str(path): path for path in paths}, "onnxruntime"))
    for (shape, dtype), families in groups.items():
        if not all(isinstance(size, int) for size in shape):
            name = families[0].original.name
            raise InputError(f"{name} takes images of any size. Export it for one size to time it.")
        yield from _tables(families, np.zeros((1, *shape), dtype), seconds)  # type: ignore[arg-type]


def _images(path: Path) -> tuple[tuple[int | None, ...], str]:
    """Shape (C, H, W) and type of the images that a file takes."""
    session = open_session(path, "onnxruntime")
    return session.input_shape[1:], str(session.input_dtype)


def _family(files: Mapping[str, Path], runtime: str) -> _Family:
    """Of the first file, which is the original in `runtime`, and the others."""

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
            for ratio in family.ratios(timings, size, artifact)
        ]

    openers = {each.key: each.open for family in families for each in family.contenders()}
    timings = measure_latency(openers, example, ratios=compared, seconds=seconds)
    for size in BATCH_SIZES:
        rows = [row for family in families for row in _rows(family, timings, size)]
        rounds = timings.spread(families[0].original.key, size).n
        yield LatencyTable(size, rounds, timings.ended_by[size], rows)


def _rows(family: _Family, timings: Timings, size: int) -> Iterator[tuple[str, ...]]:
    baseline = family.baseline(timings, size)
    for each in family.contenders():
        spread = timings.spread(each.key, size)
        if each in family.artifacts:
            compared = [difference(asdict(ratio)) for ratio in family.ratios(timings, size, each)]
        else:
            compared = ["original" if each == family.original else "", "baseline" if each == baseline else ""]
        milliseconds = f"{spread.median:.3f}\n({spread.p10:.3f} to {spread.p90:.3f})"
        file = f"{each.name}, {size_bytes(each.path) / 1e6:.3f} MB"
        yield file, f"{each.runtime}\n{each.executed}", milliseconds, *compared
