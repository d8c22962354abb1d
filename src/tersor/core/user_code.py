"""Errors inside a user's own functions: one message with the file and the line."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Generator
from contextlib import contextmanager

from tersor.core.errors import InputError
from tersor.core.resources import is_out_of_memory


@contextmanager
def user_code(name: str, function: object) -> Generator[None]:
    """Turn an exception inside a user's function into one message.

    Args:
        name: of the function, in the message.
        function: the function, or an object whose methods run. Errors that none of the functions of its module raised
            or passed on stay as they are.

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
    """The last line of the function's module that ran."""
    module = getattr(getattr(function, "func", function), "__module__", None)  # a partial has its function's module
    frames = [*traceback.walk_tb(error.__traceback__)]
    for frame, line in reversed(frames):
        if module is not None and frame.f_globals.get("__name__") == module:
            path = frame.f_code.co_filename
            return f"{path}, line {line} ({linecache.getline(path, line).strip()})"
    return None
