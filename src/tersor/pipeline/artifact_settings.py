"""How an existing artifact is measured again: its task, data, classes and normalization, from its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from tersor.checkpoint.artifact import Artifact, front_of
from tersor.core.errors import InputError
from tersor.core.files import read_json
from tersor.core.import_path import is_function_path
from tersor.deploy.onnx_file import read_onnx

if TYPE_CHECKING:  # the tasks import torch
    from tersor.evaluation.session import Session
    from tersor.tasks.task import Task

_REPEAT = "Repeat the search in another folder."
_ROUNDING = 0.002
"""Two means closer than this are the same, written with another number of digits."""


def task_of_artifact(artifact: Artifact, name: str | None) -> Task:
    """The task of this name, else of the folder's recipe, else classification.

    Raises:
        InputError: the recipe names the user's own code.
    """
    from tersor import tasks
    from tersor.recipe import read

    path = artifact.files.get("recipe.yaml")
    if name is not None or path is None:
        return tasks.build(name or "classification")
    entry = read(path).task
    if entry.is_own:
        raise InputError(
            f"the recipe in {artifact.path} has the task '{entry.name}'. Code of an artifact is never executed. If the "
            f"task is yours, write --task {entry.name}."
        )
    return entry.build()


def original_file(artifact: Artifact) -> Path:
    """The original's file, whose outputs are the targets of some tasks.

    Raises:
        InputError: there is none.
    """
    if "original.onnx" not in artifact.files:
        raise InputError(
            f"{artifact.path} has no original.onnx to compare with. Give the folder of a run, or a task with targets."
        )
    return artifact.files["original.onnx"]


def class_names(model: Path) -> list[str] | None:
    """Class names from the file's metadata, in the order of the logits.

    Raises:
        InputError: they are damaged.
    """
    told = _metadata(model)
    try:
        return TypeAdapter(list[str]).validate_json(told["classes"]) if "classes" in told else None
    except ValidationError as error:
        raise InputError(f"the class names in the metadata of {model} are damaged. Export it again.") from error


def _metadata(model: Path) -> dict[str, str]:
    """The metadata of an ONNX file; empty for other files."""
    if model.suffix != ".onnx":
        return {}
    return {entry.key: entry.value for entry in read_onnx(model).metadata_props}


def refuse_other_classes(of_artifact: Sequence[str] | None, of_data: Sequence[str]) -> None:
    """Check that the data has the same classes as the artifact.

    Raises:
        InputError: the classes differ.
    """
    if of_artifact is None or list(of_artifact) == list(of_data):
        return
    lacking, strange = (
        ", ".join(sorted(each)) for each in (set(of_artifact) - set(of_data), set(of_data) - set(of_artifact))
    )
    raise InputError(
        "the classes of the data differ from those of the artifact: "
        + "; ".join(
            [f"the data lacks {lacking}"] * bool(lacking) + [f"the artifact lacks {strange}"] * bool(strange)
            or ["only their order differs"]
        )
        + ". Give data with the same classes in the same order."
    )


class _Told(BaseModel):
    """The entries of `numbers.json` that say how the network is run."""

    model_config = ConfigDict(allow_inf_nan=False)
    runtime: str = "onnxruntime"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def numbers_of(artifact: Artifact) -> dict[str, Any]:
    """Runtime, mean and standard deviation from `numbers.json`; without them, the normalization in the file's metadata.

    Raises:
        InputError: it is damaged.
    """
    path = artifact.files.get("numbers.json")
    of_file = normalization_in(artifact.model)
    if path is None:
        return of_file
    again = "Run its recipe.yaml again." if path.name == "numbers.json" else _REPEAT
    try:
        return of_file | _Told.model_validate(read_json(path, again)).model_dump(exclude_unset=True, exclude_none=True)
    except ValidationError as error:
        raise InputError(f"{path} was not written by this version of tersor. {again}") from error


def normalization_in(model: Path) -> dict[str, Any]:
    """Mean and standard deviation from the metadata of an ONNX file; empty without any.

    Raises:
        InputError: they are damaged.
    """
    told = _metadata(model).get("normalization")
    try:
        return {} if told is None else _Told.model_validate_json(told).model_dump(include={"mean", "std"})
    except ValidationError as error:
        raise InputError(f"the normalization in the metadata of {model} is damaged. Export it again.") from error


def chosen_on_test_images(artifact: Artifact) -> bool:
    """Whether the file comes from a search whose validation images were half of its test images.

    Raises:
        InputError: the `front.json` of the search is damaged.
    """
    front = front_of(artifact.path)
    if front is None:
        return False
    told = read_json(front, _REPEAT)
    return isinstance(told, dict) and told.get("tests_chose") is True


def quantized_for(artifact: Artifact) -> str | None:
    """The runtime that the file was quantized for, from its metadata or `numbers.json`; None if it is in neither."""
    told = _metadata(artifact.model).get("runtime")
    try:
        return numbers_of(artifact).get("runtime") if told is None else TypeAdapter(str).validate_json(told)
    except ValidationError as error:
        raise InputError(f"the runtime in the metadata of {artifact.model} is damaged. Export it again.") from error


def normalization_line(mean: Sequence[float], std: Sequence[float], source: str) -> str:
    """A line with the normalization of the images, and the source of the numbers."""
    return f"normalization: mean {_shown(mean)}, std {_shown(std)} ({source})"


@dataclass(frozen=True)
class ImageOptions:
    """How images are read, as the user gives it; None: as stored in the artifact."""

    channels: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    image_size: int | Sequence[int] | None = None

    def check(self, session: Session, told: Mapping[str, Any]) -> None:
        """Check them against the file and against its folder or metadata.

        Raises:
            InputError: one of them contradicts it.
        """
        takes, sides = session.input_shape[1:], self.image_size
        if session.input_dtype == np.uint8 and (self.mean or self.std):
            raise InputError("the file takes uint8 pixels and normalizes them itself. Leave out --mean and --std.")
        if self.channels is not None and takes and takes[0] not in (None, self.channels):
            channels = f"the number of channels in the file is {takes[0]}"
            raise InputError(f"--channels is {self.channels}, but {channels}. Leave it out.")
        size = [sides, sides] if isinstance(sides, int) else sides
        if size is not None and any(fixed not in (None, side) for fixed, side in zip(takes[1:], size, strict=False)):
            shown = " x ".join(map(str, takes[1:]))
            raise InputError(f"--image-size is {' x '.join(map(str, size))}, but the file takes {shown}. Leave it out.")
        for name, given in (("mean", self.mean), ("std", self.std)):
            if given and told.get(name) and not _equal(given, told[name]):
                raise InputError(
                    f"--{name} is {_shown(given)}, but the network was exported with mean {_shown(told['mean'])} and "
                    f"std {_shown(told['std'])}. Leave out --mean and --std, or correct them."
                )


def _equal(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether they differ by rounding only."""
    return len(one) == len(other) and all(abs(a - b) < _ROUNDING for a, b in zip(one, other, strict=True))


def _shown(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def data_source(artifact: Artifact, data: str | None) -> dict[str, Any]:
    """Arguments of `tersor.data.load`: the given data, else those of the folder's recipe.

    Raises:
        InputError: there is neither, or the recipe names the user's own code.
    """
    if data is not None:
        is_table = Path(data).is_file() and not data.endswith(".py")
        return {"folder" if Path(data).is_dir() else "csv" if is_table else "name": data}
    recipe = artifact.files.get("recipe.yaml")
    if recipe is None:
        raise InputError(
            f"{artifact.path} does not name its data. Write --data with an image folder, a CSV file, a data set "
            "or file.py:function."
        )
    from tersor.recipe import read
    from tersor.recipe.data_source import YOUR_DATA

    source = read(recipe).data
    if source.name == YOUR_DATA:
        raise InputError(
            f"the images of the search in {artifact.path} were passed in Python, so its recipe does not name them. "
            "Write --data FOLDER, or --data your_file.py:function with a function that returns them."
        )
    if source.name is not None and is_function_path(source.name):
        raise InputError(
            f"the recipe in {artifact.path} loads images with the function '{source.name}'. Code of an artifact is "
            f"never executed. If the function is yours, write --data {source.name}."
        )
    return source.model_dump(exclude={"augment", "mean", "std"})
