"""`package.module:function`: how a user names a function of their own, for a network or for data."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tersor.core.errors import InputError, nearest, unknown


def is_function_path(name: str) -> bool:
    """Whether `name` is meant as `package.module:function`."""
    return ":" in name


def named(kind: str, options: Sequence[str]) -> Callable[[str], str]:
    """What checks that a name is one of the `options`, or meant as `package.module:function`, and gives it back."""

    def check(name: str) -> str:
        if name in options or is_function_path(name):
            return name
        raise InputError(f"{unknown(kind, name, options)} Or a function of yours: package.module:function.")

    return check


def import_function(path: str) -> Callable[..., Any]:
    """The function that `path` names; modules of the current folder are found after the installed ones.

    An exception that the user's module raises by itself while it is imported is not touched: its traceback is theirs.

    Raises:
        InputError: the path is malformed, the module cannot be found or read, or has no such function.
    """
    module_name, _, function_name = path.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *function_name.split(".")]):
        raise InputError(f"'{path}' names no function. Write package.module:function, as in 'my_models:build'.")
    found: Any = _import_module(module_name, path)
    where = getattr(found, "__file__", None) or "a folder"
    for part in function_name.split("."):
        if not hasattr(found, part):
            meant = nearest(part, vars(found))
            hint = f" Did you mean '{meant}'?" if meant else ""
            raise InputError(f"'{path}': module '{module_name}' ({where}) has no '{function_name}'.{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"'{path}' is of type {type(found).__name__} ({where}). Write the name of a function.")
    return found


def call_with(path: str, function: Callable[..., Any], **values: Any) -> Any:
    """Calls `function` with those of the `values` that it accepts by name.

    Raises:
        InputError: it needs arguments that are not among them.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions written in C tell nothing about themselves
        return function()
    accepts_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    by_name = {p.name for p in parameters if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}}
    given = {name: value for name, value in values.items() if accepts_any or name in by_name}
    try:
        inspect.signature(function).bind(**given)
    except TypeError as error:
        raise InputError(
            f"'{path}' cannot be called: {error}. Write a function that needs no argument"
            f"{' but ' + ' and '.join(values) if values else ''}."
        ) from error
    return function(**given)


def _import_module(name: str, path: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that a file here never stands in for an installed package
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise InputError(
                f"'{path}': there is no module '{error.name}', neither installed nor in {here}."
            ) from error
        raise InputError(f"'{path}': importing '{name}' failed: {error}.") from error
    except (ImportError, SyntaxError) as error:
        raise InputError(f"'{path}': importing '{name}' failed: {type(error).__name__}: {error}.") from error
