"""The arguments of a search, and its experiment: the original as model and as teacher, and the data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.core.files import sha256
from tersor.core.progress import ProgressReporter
from tersor.core.target import Runtime, Target
from tersor.data import Images, Splits, load
from tersor.data.augmentation import resolve
from tersor.evaluation.session import load_runtime
from tersor.graph.eval_mode import evaluating
from tersor.graph.forward_call import run
from tersor.pipeline.experiment import Experiment
from tersor.pipeline.network_checks import few_of
from tersor.pipeline.setup import prepare
from tersor.pipeline.task_arguments import Loss, task_of
from tersor.recipe import DataSource, Network, Recipe, Stage
from tersor.recipe.data_source import YOUR_DATA
from tersor.search.search_metric import refuse_other_metrics
from tersor.search.space import SMALLEST_IMAGE
from tersor.tasks.network_outputs import in_float32
from tersor.tasks.task import loss_of

_FEW = 2000
"""With fewer training images, a larger share is held out by default."""
_VALIDATION, _VALIDATION_OF_FEW = 0.1, 0.25
_GRAY_SAMPLE = 64
_FEW_IMAGES = 4


@dataclass(frozen=True)
class Request:
    """The arguments of a search, as `compress` takes them."""

    model: nn.Module | str
    data: Splits | Path | str
    weights: Path | None
    runtime: Runtime
    students: tuple[str, ...]
    pixels: tuple[int, ...]
    augment: str | None
    limit: int | None
    seed: int
    task: str
    loss: Loss | None = None
    metric: Any = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | tuple[int, ...] | None = None
    validation: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.task, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"task is of type {type(self.task).__name__}. Write its name, or 'package.module:Task'.")
        if not isinstance(self.data, Splits | Path | str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(
                f"data is of type {type(self.data).__name__}. Pass a folder, a CSV file, the name of a data set, or "
                "tersor.data.load(datasets={'train': ..., 'test': ...})."
            )
        if isinstance(self.data, Splits) and self.reading:
            raise InputError(
                f"{', '.join(self.reading)} cannot be used with images that are already loaded. Pass them to "
                "tersor.data.load."
            )
        if self.validation is not None and not 0 < self.validation < 1:
            raise InputError(
                f"validation is {self.validation:g}. Write a fraction above 0 and below 1, such as 0.2: a search "
                "compares candidates on validation images."
            )

    @property
    def reading(self) -> dict[str, Any]:
        """The given arguments of `tersor.data.load`."""
        names = "channels", "mean", "std", "image_size", "validation"
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def arguments(self) -> dict[str, str]:
        """All arguments as text, to check that a resumed search has the same ones."""
        model = self.model if isinstance(self.model, str) else _fingerprint(self.model)
        data = f"{len(self.data.train)} images" if isinstance(self.data, Splits) else _place(self.data)
        return {
            "model": model,
            "data": data,
            "weights": _with_hash(self.weights),
            "runtime": self.runtime,
            "students": ", ".join(map(_student, self.students)),
            "pixels": ", ".join(map(str, self.pixels)),
            "augment": str(self.augment),
            "limit": str(self.limit),
            "seed": str(self.seed),
            "task": self.task,
            "loss": _name(self.loss),
            "metric": _name(self.metric),
            **{name: str(value) for name, value in self.reading.items()},
        }

    def weights_of_students(self) -> dict[str, Path | None]:
        """The students by name, with their weights files.

        Raises:
            InputError: a weights file does not exist.
        """
        found: dict[str, Path | None] = {}
        for student in self.students:
            name, equals, file = student.partition("=")
            found[name] = Path(file) if equals else None
            if equals and not Path(file).is_file():
                raise InputError(f"weights file {file} of the student {name} not found. Write NAME or NAME=FILE.")
        return found


def experiment_of(request: Request, progress: ProgressReporter) -> Experiment:
    """Load the original and the data, and check that they fit.

    Raises:
        InputError: they cannot be used, or the original has no weights.
    """
    load_runtime(request.runtime)
    if request.augment is not None:
        resolve(request.augment)
    if any(size < SMALLEST_IMAGE for size in request.pixels):
        raise InputError(
            f"pixels is {min(request.pixels)}. Write the height and width of the images in pixels, {SMALLEST_IMAGE} or "
            "more."
        )
    if request.pixels and isinstance(request.data, Splits):
        raise InputError(
            "pixels cannot be used with images that are already loaded, because they have to be loaded again for each "
            "resolution. Pass a folder or a function (`file.py:function`) as data."
        )
    if isinstance(request.model, str) and request.weights is None:
        raise InputError(
            f"the network {request.model} has no weights. Pass weights=FILE (`--weights FILE`): compression starts "
            "from a trained network."
        )
    if not isinstance(request.model, str) and request.weights is not None:
        raise InputError(
            f"weights is for a network that is given by name, but the model is of type {type(request.model).__name__}. "
            "Load them first: tersor.models.load_weights(model, FILE)."
        )
    source = _source(request)
    data = request.data
    if not isinstance(data, Splits):
        data, source = _loaded(request, source)
    source = source.model_copy(update={**request.reading, "channels": data.train.channels})
    augment = request.augment or _augmentation(request, data.train)
    recipe = _recipe(request, source.model_copy(update={"augment": augment}))
    model = request.model if isinstance(request.model, nn.Module) else None
    own_mean = isinstance(request.data, Splits)
    experiment = prepare(recipe, model=model, data=data, progress=progress, own_mean=own_mean)
    task = task_of(experiment.task, request.loss, request.metric) or experiment.task
    experiment = replace(experiment, task=task)
    refuse_other_metrics(experiment.task)
    if request.loss is not None:
        _check_loss(experiment)
    return experiment


def _check_loss(experiment: Experiment) -> None:
    """Compute the user's loss once, because the first training starts minutes later.

    Raises:
        InputError: it fails, or is not a scalar tensor with a gradient.
    """
    batch = next(iter(experiment.batches(few_of(experiment, _FEW_IMAGES), _FEW_IMAGES)))
    with evaluating(experiment.model), torch.enable_grad():
        loss_of(experiment.task, in_float32(run(experiment.model, batch.images)), batch.targets)


def _recipe(request: Request, data: DataSource) -> Recipe:
    return Recipe(
        model=_network(request),
        teacher="original",
        task=request.task,
        data=data,
        target=Target(runtime=request.runtime),
        seed=request.seed,
        stages=(Stage(name="train", steps=1),),
    )


def _network(request: Request) -> Network:
    if isinstance(request.model, str):
        return Network(name=request.model, weights=request.weights)
    kind = type(request.model)
    return Network(name=f"{kind.__module__}:{kind.__qualname__}")


def _source(request: Request) -> DataSource:
    if isinstance(request.data, Splits):
        return DataSource(name=YOUR_DATA, limit=request.limit)
    text = str(request.data)
    where: dict[str, Any] = (
        {"folder": Path(text)} if Path(text).is_dir() else {"csv" if text.endswith(".csv") else "name": text}
    )
    return DataSource(**where, limit=request.limit)


def _loaded(request: Request, source: DataSource) -> tuple[Splits, DataSource]:
    """The images; if there are few, a larger share is held out, because a small validation set is too noisy."""
    options: dict[str, Any] = source.model_dump(exclude={"augment"}) | {
        "channels": None,
        "validation": _VALIDATION,
        **request.reading,
    }
    splits = load(seed=request.seed, **options)
    few = len(splits.train) + len(splits.validation) < _FEW and len(splits.validation)
    if not few or request.validation is not None:
        return splits, source
    options["validation"] = _VALIDATION_OF_FEW
    return load(seed=request.seed, **options), source.model_copy(update={"validation": _VALIDATION_OF_FEW})


def _augmentation(request: Request, images: Images) -> str:
    """The default: gray images may be letters or digits, which must not be mirrored; boxes must not be cropped."""
    return "none" if _gray(images) else "flip" if request.task == "detection" else "crop_flip"


def _gray(images: Images) -> bool:
    """Whether the first images have no color: letters and digits, which must not be mirrored."""
    pixels = images.take(torch.arange(min(_GRAY_SAMPLE, len(images))))
    return bool((pixels[:, :1] == pixels).all())


def _name(function: Any) -> str:
    """The name of a user-defined loss or metric."""
    return "None" if function is None else str(getattr(function, "__qualname__", type(function).__qualname__))


def _place(data: Path | str) -> str:
    """Equal for `cars` and `cars/`."""
    return str(Path(data)) if Path(data).exists() else str(data)


def _with_hash(file: Path | None) -> str:
    """The path of a file and a part of its hash, so that another file of the same name is noticed."""
    return f"{file} (sha256 {sha256(file)[:12]})" if file is not None and file.is_file() else str(file)


def _student(student: str) -> str:
    name, equals, file = student.partition("=")
    return f"{name}={_with_hash(Path(file))}" if equals else name


def _fingerprint(model: nn.Module) -> str:
    """A short text that identifies the weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.double().sum().item()!r}".encode())
    return f"{type(model).__name__} {digest.hexdigest()[:12]}"
