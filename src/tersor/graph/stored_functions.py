"""Functions that a network stores, such as hooks and lambdas, and that use its modules through their variables.

    self.block = lambda images: self.conv(images).relu()

A deep copy shares functions with the original, so the copy of this network would run the original's `conv`. In a plain
copy such functions are replaced by callables that are copied together with the modules that they use.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import suppress
from types import CellType, FunctionType, MethodType
from typing import Any, cast

from torch import nn

Memo = dict[int, Any]
"""The copies made by `copy.deepcopy`, by the id of the original."""


def use_copied_modules(network: nn.Module, copies: Memo) -> None:
    """Replace the functions stored in `network`, a deep copy, that use modules of the original.

    Args:
        network: the copy; it is changed.
        copies: the dictionary that `copy.deepcopy` filled.
    """
    for module in network.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, dict):  # of hooks, for example
                held = cast("MutableMapping[Any, Any]", value)
                for name, each in list(held.items()):
                    if _uses_modules(each, copies):
                        held[name] = _Copied(_with_copies(each, copies))
            elif _uses_modules(value, copies):
                vars(module)[key] = _Copied(_with_copies(value, copies))


class _Copied:
    """A function that is deep-copied together with the modules that it uses."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: Memo) -> _Copied:
        return _Copied(_with_copies(self.function, memo))


def _uses_modules(function: object, copies: Memo, seen: tuple[object, ...] = ()) -> bool:
    """Whether a variable or default of a Python function is a module of the network, or a function that uses one."""
    if not isinstance(function, FunctionType) or function in seen:
        return False
    variables = [each.__self__ if isinstance(each, MethodType) else each for each in _variables(function)]
    return any(
        (isinstance(each, nn.Module) and id(each) in copies) or _uses_modules(each, copies, (*seen, function))
        for each in variables
    )


def _variables(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a variable that is not set yet
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()


def _with_copies(function: Callable[..., Any], copies: Memo) -> Callable[..., Any]:
    """The function with the copies of the modules in place of the modules."""
    if not isinstance(function, FunctionType):
        return function
    cells = tuple(_cell(each, copies) for each in function.__closure__ or ())
    defaults = tuple(_value(each, copies) for each in function.__defaults__ or ()) or None
    made = FunctionType(function.__code__, function.__globals__, function.__name__, defaults, cells or None)
    functools.update_wrapper(made, function)
    vars(made).pop("__wrapped__")
    if function.__kwdefaults__:
        made.__kwdefaults__ = {key: _value(each, copies) for key, each in function.__kwdefaults__.items()}
    return made


def _cell(cell: CellType, copies: Memo) -> CellType:
    """A cell with the copied value; functions that shared a variable share the new one."""
    if id(cell) not in copies:
        made = copies[id(cell)] = CellType()
        with suppress(ValueError):  # a variable that is not set yet
            made.cell_contents = _value(cell.cell_contents, copies)
    return copies[id(cell)]


def _value(value: Any, copies: Memo) -> Any:
    if isinstance(value, nn.Module) or (isinstance(value, MethodType) and isinstance(value.__self__, nn.Module)):
        return copy.deepcopy(value, copies)
    return _with_copies(value, copies) if isinstance(value, FunctionType) else value
