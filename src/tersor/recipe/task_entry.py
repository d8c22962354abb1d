"""The task of a recipe: a name, or a name with parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from tersor import tasks
from tersor.core.errors import InputError, unknown
from tersor.core.import_path import is_function_path
from tersor.recipe.yaml import shown

if TYPE_CHECKING:
    from tersor.tasks.task import Task


class TaskEntry(NamedTuple):
    """A task by name; the user's own (package.module:Task) is imported by `build` only."""

    name: str = "classification"
    parameters: dict[str, Any] = {}  # noqa: RUF012

    @property
    def is_own(self) -> bool:
        """Whether it names the user's code."""
        return is_function_path(self.name)

    def build(self) -> Task:
        """The task.

        Raises:
            InputError: a parameter is invalid, or the user's code does not return a task.
        """
        return tasks.build(self.name, **self.parameters)


def _entry(value: Any) -> TaskEntry:
    if isinstance(value, TaskEntry):
        return value
    if isinstance(value, str):
        value = {value: None}
    if not isinstance(value, dict) or len(value) != 1:
        raise InputError(
            f"task must be a name, or a name with parameters, got {shown(value)}. Write task: segmentation, or task: "
            f"{{segmentation: {{num_classes: 4}}}}. Possible: {', '.join(tasks.NAMES)}, package.module:Task."
        )
    (name, parameters), *_ = value.items()
    if not isinstance(parameters, dict | None):
        raise InputError(
            f"the parameters of task {name} must be keys with values, got {shown(parameters)}. Write them in braces, "
            "as in task: {segmentation: {num_classes: 4}}."
        )
    entry = TaskEntry(name, parameters or {})
    if not entry.is_own and name not in tasks.NAMES:
        raise unknown("task", name, [*tasks.NAMES, "package.module:Task"], "the class of a task")
    if not entry.is_own and entry.parameters:
        entry.build()  # checks the parameters
    return entry


def _plain(entry: TaskEntry) -> Any:
    return {entry.name: entry.parameters} if entry.parameters else entry.name


_SCHEMA = {
    "anyOf": [
        {"enum": list(tasks.NAMES)},
        {"type": "string", "pattern": ":"},
        {"type": "object", "minProperties": 1, "maxProperties": 1},
    ]
}
RecipeTask = Annotated[Any, BeforeValidator(_entry), PlainSerializer(_plain), WithJsonSchema(_SCHEMA)]
