"""Errors inside a user's own functions: one message with the file and the line."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from itertools import product

from tersor.core.errors import InputError
from tersor.core.resources import is_out_of_memory


@contextmanager
def user_code(name: str, function: object) -> Generator[None]:
    """Turn an exception inside a user's function into one message.

    Args:
        name: of the function, in the message.
        function: the function, or an object whose methods run. Errors that none of the functions of its module, or of
            the modules of its base classes, raised or passed on stay as they are.

    Raises:
        InputError: the function raised an exception.
    """
    try:
        yield
    except Exception as error:
        place = None if isinstance(error, InputError) or is_out_of_memory(error) else _place(error, function)
        if place is None:
            raise
        raise InputError(f"{name} failed in {place}: {type(error).__name__}: {error}") from error


def _place(error: Exception, function: object) -> str | None:
    """The last line that ran of the function's module, or of a module of its base classes."""
    function = getattr(function, "func", function)  # a partial
    modules = [getattr(function, "__module__", None), *(kind.__module__ for kind in type(function).__mro__)]
    frames = [*traceback.walk_tb(error.__traceback__)][::-1]
    for module, (frame, line) in product(modules, frames):
        if module is not None and frame.f_globals.get("__name__") == module:
            path = frame.f_code.co_filename
            return f"{path}, line {line} ({linecache.getline(path, line).strip()})"
    return None
