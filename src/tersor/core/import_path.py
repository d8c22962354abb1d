"""Import functions that a user names as `package.module:function` or `folder/file.py:function`."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from tersor.core.errors import InputError, nearest, unknown, without_function
from tersor.core.plain_values import in_one_line
from tersor.core.user_code import user_code


def is_function_path(name: str) -> bool:
    """Whether `name` has the form `package.module:function` or `folder/file.py:function`."""
    return ":" in name


def module_and_name(path: str) -> tuple[str, str]:
    """`package.module` and `function` of `package.module:function`, or of `package/module.py:function`.

    A file outside the current folder is a module without a package.
    """
    module, _, name = path.partition(":")
    if _is_elsewhere(file := Path(module)):
        return file.stem, name
    return (".".join(file.with_suffix("").parts) if file.suffix == ".py" else module), name


def _is_elsewhere(file: Path) -> bool:
    return file.suffix == ".py" and (file.is_absolute() or ".." in file.parts)


def named(kind: str, options: Sequence[str]) -> Callable[[str], str]:
    """Return a validator that accepts the `options` and `package.module:function`."""

    def check(name: str) -> str:
        if name in options or is_function_path(name):
            return name
        error = unknown(kind, name, options, "your function")
        if name.endswith(".py"):
            raise error
        raise InputError(
            f"{error} You can also name a function of your own: package.module:function or folder/file.py:function."
        )

    return check


def _no_function(path: str) -> InputError:
    module, _, name = path.partition(":")
    file = Path(module)
    if file.suffix != ".py" or not file.is_file():
        return InputError(
            f"'{path}' does not name a function. Write package.module:function, as in 'my_models:build', or the path "
            "of a Python file, as in 'my_models.py:build'."
        )
    if not name:
        return without_function(module, "a function or class in it")
    rule = "so that its name has only letters, digits and underscores, and begins with a letter"
    if not file.stem.isidentifier():
        return InputError(f"'{path}': Python cannot import {module}. Rename the file, {rule}.")
    folders = [] if _is_elsewhere(file) else [part for part in file.parent.parts if not part.isidentifier()]
    if folders:
        return InputError(f"'{path}': Python cannot import from the folder '{folders[0]}'. Rename the folder, {rule}.")
    return InputError(f"'{path}': '{name}' cannot be the name of a Python function. Write one that {module} defines.")


def import_function(path: str) -> Callable[..., Any]:
    """Import the function that `path` names, from an installed module or a module in the current folder.

    Installed modules come first.

    Raises:
        InputError: the path is malformed, the module cannot be imported or raises an exception, or it has no such
            function.
    """
    module_name, function_name = module_and_name(path)
    if path.endswith(".py"):
        raise without_function(path, "a function or class in it")
    if not all(part.isidentifier() for part in [*module_name.split("."), *function_name.split(".")]):
        raise _no_function(path)
    target: Any = import_module(module_name, path)
    where = getattr(target, "__file__", None) or "a folder"
    for part in function_name.split("."):
        if not hasattr(target, part):
            similar = nearest(part, vars(target))
            hint = f" Did you mean '{similar}'?" if similar else ""
            raise InputError(f"'{path}': module '{module_name}' ({where}) has no '{function_name}'.{hint}")
        target = getattr(target, part)
    if not callable(target):
        raise InputError(f"'{path}' is of type {type(target).__name__} ({where}). Write the name of a function.")
    return target


def accepts(function: Callable[..., Any], argument: str) -> bool:
    """Whether `call_with` passes `argument` to the function."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some functions written in C have no signature
        return False
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    by_name = argument in parameters and parameters[argument].kind in kinds
    return by_name or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())


def call_with(path: str, function: Callable[..., Any], explanation: str = "", /, **values: Any) -> Any:
    """Call `function` with those of the `values` that it accepts by name.

    Args:
        path: names the function in errors.
        function: the function to call.
        explanation: what the values are; a sentence in the error about its arguments.
        values: the values by name.

    Raises:
        InputError: it requires other arguments, or raises an exception.
    """
    accepted = {name: value for name, value in values.items() if accepts(function, name)}
    try:
        inspect.signature(function).bind(**accepted)
    except ValueError:  # some functions written in C have no signature
        return function()
    except TypeError as error:
        raise InputError(
            f"'{path}' cannot be called: {error}. Write a function that needs no argument"
            f"{' other than ' + ', '.join(values) if values else ''}.{explanation and f' {explanation}'}"
        ) from error
    try:
        with user_code(f"'{path}'", function):
            return function(**accepted)
    except ValidationError as error:  # of a user-defined class; no line of the user's code has run
        raise InputError(f"'{path}': {in_one_line(error)}.") from error


def import_module(name: str, path: str) -> ModuleType:
    """Import the module `name` of `path` from Python's search path, the current folder or the folder of the file.

    Raises:
        InputError: there is no such module, or it raises an exception.
    """
    file = Path(path.partition(":")[0])
    elsewhere = _is_elsewhere(file)
    here = str(file.resolve().parent if elsewhere else Path.cwd())
    if here not in sys.path and (elsewhere or "" not in sys.path):
        sys.path.append(here)  # last, so that a file here never shadows an installed package
    importlib.invalidate_caches()
    module = _imported(name, path, here, file)
    if elsewhere and Path(module.__file__ or "").resolve() != file.resolve():
        found = module.__file__ or "a built-in module of Python"
        raise InputError(f"'{path}': '{name}' is already the name of {found}. Rename {file.name}.")
    return module


def _unreachable(path: str, name: str, file: Path) -> InputError:
    """The error for an existing file that Python does not find as the module `name`."""
    folder = name.partition(".")[0]
    if "." not in file.stem and folder in sys.modules:
        found = getattr(sys.modules[folder], "__file__", None) or "a built-in module"
        return InputError(f"'{path}': Python imports '{folder}' from {found}, not from this folder. Rename the folder.")
    return InputError(f"'{path}': '{file.stem}' cannot be the name of a Python module. Rename the file.")


def _imported(name: str, path: str, here: str, file: Path) -> ModuleType:
    try:
        with user_code(f"'{path}': importing '{name}'", name):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise InputError(f"'{path}': importing '{name}' failed: {error}.") from error
        if file.suffix == ".py" and file.is_file():
            raise _unreachable(path, name, file) from error
        if file.suffix == ".py":
            missing = file.name if _is_elsewhere(file) else file
            raise InputError(f"'{path}': there is no file '{missing}' in {here}.") from error
        as_file = f"{name.replace('.', '/')}.py:{path.partition(':')[2]}"
        raise InputError(
            f"'{path}': there is no module '{error.name}', neither installed nor in {here}. You can also write the "
            f"path of a file relative to this folder, as in '{as_file}' or 'folder/{as_file}'."
        ) from error
    except (ImportError, SyntaxError) as error:
        raise InputError(f"'{path}': importing '{name}' failed: {type(error).__name__}: {error}.") from error
