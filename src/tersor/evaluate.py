"""Artifacts that are there already: their accuracy on a test set, and their latency against each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from tersor.core.errors import InputError
from tersor.core.function_path import is_function_path
from tersor.core.json_file import read_json
from tersor.core.watch import Watch
from tersor.export.artifact import Artifact, read_artifact
from tersor.export.bench import BATCH_SIZES, latency, predictions, size_bytes
from tersor.export.runtime import RUNTIMES, Session, load_runtime, open_session

_BATCH = 500


@dataclass(frozen=True)
class Evaluation:
    """Percent of the test images that were told right, and where."""

    accuracy: float
    images: int
    runtime: str
    precision: str


def evaluate(artifact: Path, data: str | None, runtime: str | None, *, watch: Watch) -> Evaluation:
    """Runs `artifact` over the test images of `data`.

    Args:
        artifact: the folder of a run, or an ONNX file.
        data: an image folder or the name of a data set; of the folder's recipe by default.
        runtime: of the folder's recipe by default, else ONNX Runtime.
        watch: who looks on.

    Raises:
        InputError: the artifact or the data cannot be used, or a bare file is given without data.
    """
    from tersor.data import Batches, load
    from tersor.export.numbers import arrays

    found = read_artifact(artifact)
    numbers = _numbers(found)
    session = open_session(found.model, runtime or numbers.get("runtime", "onnxruntime"))
    watch.say("reading the images")
    options = _source(found, data) | {key: numbers[key] for key in ("mean", "std") if key in numbers}
    splits = load(**options)
    _refuse_other_classes(_classes(found.model), splits.classes)
    assert splits.mean is not None
    assert splits.std is not None
    batches = Batches(splits.test, _BATCH, mean=splits.mean, std=splits.std)
    kind = "uint8" if session.input_dtype == np.uint8 else "normalized"
    watch.start("test set", 1)
    answers = predictions(session, arrays(batches, kind))
    watch.advance()
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


def timed(artifacts: Sequence[Path], seconds: float) -> Iterator[tuple[str, ...]]:
    """Rows (runtime, batch, median and spread in ms, rounds, file and MB): all in one run, interleaved."""
    files: dict[str, Path] = {}
    for artifact in artifacts:
        found = read_artifact(artifact)
        for name in ("original.onnx", "model.onnx"):
            if name in found.files:
                files[f"{artifact}/{name}"] = found.files[name]
        if not found.path.is_dir():
            files[str(artifact)] = found.model
    sessions = {
        (name, runtime): open_session(path, runtime) for name, path in files.items() for runtime in _installed()
    }
    groups: dict[tuple[Any, ...], dict[tuple[str, str], Session]] = {}
    for key, session in sessions.items():
        groups.setdefault((session.input_shape[1:], session.input_dtype), {})[key] = session
    for (shape, dtype), group in groups.items():
        if not all(isinstance(size, int) for size in shape):
            raise InputError(f"{next(iter(group))[0]} takes images of any size. Export it for one size to time it.")
        named = {" in ".join(key): session for key, session in group.items()}
        timings = latency(named, np.zeros((1, *shape), dtype), seconds=seconds)
        for name, runtime in group:
            for size in BATCH_SIZES:
                spread = timings.spread(f"{name} in {runtime}", size)
                spent = f"{spread.median:.3f} ({spread.p10:.3f} to {spread.p90:.3f})"
                megabytes = f"{size_bytes(files[name]) / 1e6:.3f}"
                yield runtime, str(size), spent, str(spread.n), f"{name}, {megabytes}"


def _installed() -> list[str]:
    found: list[str] = []
    for runtime in RUNTIMES:
        try:
            load_runtime(runtime)
        except InputError:
            continue
        found.append(runtime)
    return found
