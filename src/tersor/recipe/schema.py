"""The schema of a recipe: model, data, target runtime and stages, validated before torch is imported.

recipe = read("recipe.yaml", ["stages.0.epochs=3"])
parse(write(recipe), "the same again") == recipe
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails

from tersor import methods as registry
from tersor.core.errors import InputError
from tersor.core.plain_values import PlainRecord
from tersor.core.target import Target
from tersor.core.user_code import user_code
from tersor.recipe.data_source import DataSource, Named
from tersor.recipe.recipe_file import text_of
from tersor.recipe.task_entry import RecipeTask, TaskEntry
from tersor.recipe.validation_errors import explain
from tersor.recipe.yaml import Located, Location, complete, dump, load, override, plain, shown
from tersor.training.options import PLAIN, Training


class Network(PlainRecord):
    """A network and its weights file."""

    model_config = PLAIN
    name: Annotated[
        Named,
        Field(description="resnet20, a model of torchvision, timm:NAME, hf:CLASS:CONFIG, or package.module:function"),
    ]
    num_classes: Annotated[int | None, Field(ge=1, description="number of classes; by default as in the data")] = None
    weights: Annotated[
        Path | None, Field(description="safetensors or a torch checkpoint; random weights by default")
    ] = None


class Teacher(Network):
    """The network to learn from. Without weights, it is first trained on the labels only."""

    epochs: Annotated[int, Field(ge=0, description="epochs of training before the first stage")] = 0
    training: Annotated[Training, Field(description="training options, as in a stage")] = Training()


def _method(entry: Any) -> Any:
    """The method of `soft_targets` or `{soft_targets: {temperature: 4}}`; an instance is returned unchanged."""
    if hasattr(entry, "attach"):
        if not registry.is_method(type(entry)):
            whose = entry.__name__ if isinstance(entry, type) else type(entry).__name__
            raise InputError(f"{whose} is not an instance of a method. {registry.MADE_BY}")
        return entry
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, dict):
        possible = ", ".join(registry.names())
        raise InputError(
            f"a method must be a name, or a name with parameters, got {shown(entry)}. Possible: {possible}."
        )
    name, *more = entry or [""]
    if more:
        raise InputError(
            f"a method must be one key with its parameters inside, got the keys {', '.join(entry)}. "
            f"Write - {name}: {{{more[0]}: ...}}, or start each method with its own dash."
        )
    cls: Any = registry.get(name)
    adapter = TypeAdapter[dict[str, Any]](dict[str, cls])  # pyright: ignore[reportInvalidTypeForm]
    parameters = {} if entry[name] is None else entry[name]
    _refuse_unknown(name, parameters, cls)
    with user_code(f"method '{name}'", cls):
        return adapter.validate_json(json.dumps({name: parameters}), strict=True)[name]


def _refuse_unknown(name: str, parameters: Any, cls: Any) -> None:
    """Refuse parameters that are no fields. A user's class may lack `extra="forbid"`, and would ignore them."""
    if not isinstance(parameters, dict) or cls.__pydantic_config__.get("extra") == "forbid":
        return
    known = {field.alias or key for key, field in _fields(cls).items()}
    strange = [
        InitErrorDetails(type="unexpected_keyword_argument", loc=(name, key), input=value)
        for key, value in parameters.items()
        if key not in known
    ]
    if strange:
        raise ValidationError.from_exception_data("method", strange)


def _entry(method: Any) -> Any:
    """The inverse of `_method`, with all parameters of a user's method, whose defaults may change."""
    name = registry.name_of(method)
    shipped = name in registry.names()
    parameters = TypeAdapter(type(method)).dump_python(method, mode="json", exclude_defaults=shipped)
    return {name: parameters} if parameters else name


class Stage(Training):
    """A stage: methods that are attached together, and the training with them."""

    name: Annotated[Named, Field(max_length=64, description="letters, digits, - and _")]
    epochs: Annotated[int, Field(ge=0, description="epochs of training")] = 0
    steps: Annotated[int, Field(ge=0, description="optimizer steps, instead of epochs")] = 0
    methods: Annotated[
        tuple[Annotated[Any, BeforeValidator(_method), PlainSerializer(_entry)], ...],
        Field(description="names, or a name with its parameters: {soft_targets: {temperature: 4}}"),
    ] = ()
    cache: Annotated[bool, Field(description="cache the teacher outputs; needs data without augmentation")] = False
    validate_every: Annotated[
        int | None, Field(ge=1, description="epochs between validations; only at the end by default")
    ] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems: list[tuple[Location, str]] = []
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            problems.append((("name",), f"a stage name may contain letters, digits, - and _, got {self.name!r}."))
        if self.epochs and self.steps:
            given = f"epochs: {self.epochs} and steps: {self.steps}"
            problems.append((("steps",), f"a stage cannot have both epochs and steps, got {given}. Remove one."))
        if self.validate_every and not self.epochs and not self.steps:
            message = f"validate_every needs training, and stage '{self.name}' has 0 steps. Remove validate_every."
            problems.append((("validate_every",), message))
        names = [registry.name_of(method) for method in self.methods]
        for index, method in enumerate(self.methods):
            if names[index] in names[:index]:
                message = f"stage '{self.name}' lists the method '{names[index]}' twice. Remove one."
                problems.append((("methods", index), message))
            if getattr(method, "needs_steps", False) and not self.epochs and not self.steps:
                message = f"'{names[index]}' needs training, and stage '{self.name}' has 0 steps."
                problems.append((("methods", index), f"{message} Write epochs: ... or steps: ... in that stage."))
        _raise(problems)
        return self


class Recipe(PlainRecord):
    """Everything about one compression run."""

    model_config = PLAIN
    model: Annotated[Network, Field(description="the network to compress")]
    teacher: Annotated[
        Teacher | Literal["original"] | None,
        Field(description="the network to learn from; original: the model before compression"),
    ] = None
    task: Annotated[
        RecipeTask,
        Field(description="classification, segmentation, ..., with parameters if any; or package.module:Task"),
    ] = TaskEntry()
    data: Annotated[DataSource, Field(description="the images")]
    target: Annotated[Target, Field(default_factory=Target, description="the runtime and the processor type")]
    seed: Annotated[int, Field(ge=0, lt=2**32, description="random seed")] = 0
    checkpoint_every: Annotated[int, Field(ge=1, description="steps between checkpoints within a stage")] = 200
    stages: Annotated[tuple[Stage, ...], Field(min_length=1, description="stages, run one after another")]

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems: list[tuple[Location, str]] = []
        seen: dict[str, str] = {}
        for index, stage in enumerate(self.stages):
            first = seen.setdefault(
                stage.name.casefold(), stage.name
            )  # stage names become file names, and file systems may ignore case
            if first is not stage.name:
                problems.append((("stages", index, "name"), f"there is already a stage '{first}'. Write another name."))
            if stage.cache and (self.teacher is None or self.data.augment != "none"):
                why = "there is no teacher" if self.teacher is None else f"data.augment is {self.data.augment}"
                message = f"cache needs a teacher and images without augmentation, but {why}. Remove cache"
                hint = "." if self.teacher is None else ", or write data.augment: none."
                problems.append((("stages", index, "cache"), message + hint))
            for place, method in enumerate(stage.methods):
                if getattr(method, "needs_teacher", False) and self.teacher is None:
                    message = f"'{registry.name_of(method)}' needs a teacher, and the recipe has none."
                    hint = "Write teacher: {name: ..., weights: ...} or teacher: original (the uncompressed model)."
                    problems.append((("stages", index, "methods", place), f"{message} {hint}"))
        _raise(problems)
        return self


def _raise(problems: list[tuple[Location, str]]) -> None:
    """Raise several problems of a model at once, each with its location."""
    if problems:
        details = [
            InitErrorDetails(type="value_error", loc=where, input=None, ctx={"error": InputError(message)})
            for where, message in problems
        ]
        raise ValidationError.from_exception_data("recipe", details)


def read(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file. Paths in it are relative to the working directory.

    Args:
        path: a YAML file.
        overrides: `path=value` each, such as `stages.0.epochs=3`.

    Raises:
        InputError: the file cannot be read or is invalid; one line per problem.
    """
    tree = load(text_of(Path(path)), str(path))
    for assignment in overrides:
        override(tree, assignment)
    return _validated(tree)


def parse(text: str, name: str) -> Recipe:
    """Parse a recipe from YAML text; `name` is its name in error messages.

    Raises:
        InputError: it is invalid; one line per problem.
    """
    return _validated(load(text, name))


def write(recipe: Recipe) -> str:
    """YAML text of everything that differs from the defaults; `parse` returns the same recipe."""
    return dump(recipe.model_dump(mode="json", exclude_defaults=True))


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe, with every method and its parameters, for editors."""
    adapters: dict[str, TypeAdapter[Any]] = {name: TypeAdapter(registry.get(name)) for name in registry.names()}
    inputs = [(name, "validation", adapter) for name, adapter in adapters.items()]
    found, shared = TypeAdapter.json_schemas([("", "validation", TypeAdapter(Recipe)), *inputs])  # pyright: ignore[reportArgumentType]
    definitions = shared["$defs"]
    entries: list[dict[str, Any]] = [{"enum": list(adapters)}, {"type": "string", "pattern": ":"}]
    for name in adapters:
        parameters = {"anyOf": [found[name, "validation"], {"type": "null"}]}
        entry = {"type": "object", "properties": {name: parameters}, "required": [name], "additionalProperties": False}
        entries.append(entry)
    own = {"type": "object", "patternProperties": {":": {}}, "additionalProperties": False, "minProperties": 1}
    definitions["Stage"]["properties"]["methods"]["items"] = {"anyOf": [*entries, own]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found["", "validation"], "$defs": definitions}


def _validated(tree: Located) -> Recipe:
    try:
        # strict: `epochs: true` is not 1. As JSON: there, strict pydantic takes a list for a tuple, text for a path
        return Recipe.model_validate_json(json.dumps(plain(complete(tree))), strict=True)
    except ValidationError as error:
        raise explain(error, tree, _keys) from None


def _keys(location: Location) -> list[str]:
    """The valid keys of the mapping at `location`."""
    records: list[Any] = [Recipe]
    for part in location:
        fields = {key: field for record in records for key, field in _fields(record).items()}
        if part in fields:
            records = list(_records(fields[str(part)].annotation))
        elif isinstance(part, str) and not records:  # below `methods`, the name of one
            records = [registry.get(part)]
    return [key for record in records for key in _fields(record)]


def _fields(record: Any) -> dict[str, FieldInfo]:
    return record.__pydantic_fields__


def _records(annotation: Any) -> Iterator[Any]:
    """The models in a type: `Network` in `Network | None`."""
    if hasattr(annotation, "__pydantic_fields__"):
        yield annotation
    for argument in get_args(annotation):
        yield from _records(argument)
