"""Errors inside a user's own functions: one message with the file and the line."""

from __future__ import annotations

import functools
import linecache
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from itertools import product

from tersor.core.errors import InputError
from tersor.core.resources import is_out_of_memory


@contextmanager
def user_code(name: str, function: object, *, if_none: str = "") -> Generator[None]:
    """Turn an exception inside a user's function into one message.

    Args:
        name: of the function, in the message.
        function: the function, an object whose methods run, or the name of a module that is imported. An error stays
            unchanged if no function of its module, or of a module of its base classes, is in the traceback. Errors of
            tersor's own classes stay unchanged too.
        if_none: a sentence for exceptions that a value None caused.

    Raises:
        InputError: the function raised an exception.
    """
    try:
        yield
    except Exception as error:
        place = None if isinstance(error, InputError) or is_out_of_memory(error) else _place(error, function)
        if place is None:
            raise
        said = f"{type(error).__name__}: {error}".removesuffix(": ")
        hint = f". {if_none}" if if_none and _is_about_none(error, place) else ""
        raise InputError(f"{name} failed in {place}: {said}{hint}") from error


def _is_about_none(error: Exception, place: str) -> bool:
    return "NoneType" in str(error) or (isinstance(error, AssertionError) and "None" in place)


def _place(error: Exception, function: object) -> str | None:
    """The last line that ran of the function's module, or of a module of its base classes."""
    called: object = function.func if isinstance(function, functools.partial) else function
    kind: type = type(called)
    own: str | None = called if isinstance(called, str) else getattr(called, "__module__", None)
    bases = [base.__module__ for base in kind.__mro__ if base.__module__.partition(".")[0] != "torch"]
    modules = [module for module in (own, *bases) if module is not None and module.partition(".")[0] != "tersor"]
    frames = [*traceback.walk_tb(error.__traceback__)][::-1]
    for module, (frame, line) in product(modules, frames):
        if frame.f_globals.get("__name__") == module:
            path = frame.f_code.co_filename
            return f"{path}, line {line} ({linecache.getline(path, line).strip()})"
    return None
