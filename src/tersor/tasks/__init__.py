"""Tasks by name: `segmentation` is the class in `segmentation.py`. Only the requested file is imported."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, cast

from tersor.core.errors import InputError, unknown
from tersor.core.import_path import call_with, import_function, is_function_path

if TYPE_CHECKING:  # it imports torch, which is not needed to list the names
    from tersor.tasks.task import Task

NAMES = ("classification", "multilabel", "segmentation", "detection", "regression", "embedding", "distance")


def get(name: str) -> type[Task]:
    """The class of a built-in task.

    Raises:
        InputError: the task does not exist.
    """
    if name not in NAMES:
        raise unknown("task", name, [*NAMES, "package.module:Task"], "the class of a task")
    module = importlib.import_module(f"{__name__}.{name}")
    return cast("type[Task]", getattr(module, name.capitalize()))


def build(task: str | Task, **parameters: Any) -> Task:
    """The task of this name, or the given task.

    Args:
        task: one of `NAMES`, "package.module:Task" (a subclass of `tersor.tasks.task.Task`, or a function that
            returns one), or an instance.
        parameters: parameters of the class or function.

    Raises:
        InputError: the name is unknown, a parameter is invalid, or the result is not a `Task`.
    """
    from tersor.tasks.task import Task

    made: Any = task
    if isinstance(task, str) and is_function_path(task):
        made = call_with(task, import_function(task), **parameters)
    elif isinstance(task, str):
        made = get(task)(**parameters)
    if not isinstance(made, Task):
        raise InputError(
            f"the task is of type {type(made).__name__}. Write one of {', '.join(NAMES)}, or package.module:Task, a "
            "subclass of tersor.tasks.task.Task."
        )
    missing = [name for name in ("loss", "score") if getattr(type(made), name) is getattr(Task, name)]
    missing += [] if hasattr(made, "metric") else ["metric"]
    if missing:
        raise InputError(
            f"the task {type(made).__name__} has no {' and no '.join(missing)}, which every task must define."
        )
    return made


def name_of(task: Task) -> str:
    """The name of a task in a recipe."""
    cls = type(task)
    folder, _, file = cls.__module__.rpartition(".")
    return file if folder == __name__ else f"{cls.__module__}:{cls.__qualname__}"
