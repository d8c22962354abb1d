"""Errors inside a user's own functions: one message with the file and the line."""

from __future__ import annotations

import functools
import linecache
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from itertools import product

from pydantic import ValidationError

from tersor.core.errors import InputError
from tersor.core.plain_values import in_one_line
from tersor.core.resources import is_out_of_memory

_FAILED_IN = " failed in "


@contextmanager
def user_code(name: str, function: object, *, if_none: str = "") -> Generator[None]:
    """Turn an exception inside a user's function into one message.

    Args:
        name: name of the function in the message.
        function: the function, an object whose methods run, or the name of a module that is imported. An error stays
            unchanged unless the traceback contains code of the module of `function`, or of a module that defines one of
            its base classes. Errors of tersor's own classes stay unchanged too, and so does an InputError that the
            user's code raises itself.
        if_none: a hint that is appended if the exception was caused by a value of None.

    Raises:
        InputError: the function raised an exception, or exited the program.
    """
    try:
        yield
    except SystemExit as error:
        raise InputError(
            f"{name} exited the program (sys.exit, or an argument parser). Move the script's code under "
            "`if __name__ == '__main__':`."
        ) from error
    except Exception as error:
        place = None if _is_clear(error) or is_out_of_memory(error) else _place(error, function)
        if place is None:
            raise
        hint = f". {if_none}" if if_none and _is_about_none(error, place) else ""
        raise InputError(f"{name}{_FAILED_IN}{place}: {_said(error)}{hint}") from error


def _said(error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    text = in_one_line(error) if isinstance(error, ValidationError) else str(error)
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def _is_clear(error: Exception) -> bool:
    """Whether it is a message for the user that needs no line: tersor did not raise it, or it names one already."""
    if not isinstance(error, InputError):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    of_tersor = str(frame.f_globals.get("__name__")).partition(".")[0] == "tersor"
    return type(error) is not InputError or not of_tersor or _FAILED_IN in str(error)


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
