"""Functions that a network stores, such as hooks and lambdas, and that use parts of it through their variables.

    self.block = lambda images: self.conv(images).relu()

A deep copy shares functions with the original, so the copy of this network would run the original's `conv`. In a plain
copy such functions are replaced by callables that are copied together with the modules, tensors and containers that
they use, such as the list in which a hook collects features.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import suppress
from types import CellType, FunctionType, MethodType
from typing import Any, cast

from torch import Tensor, nn

Memo = dict[int, Any]
"""The copies made by `copy.deepcopy`, by the id of the original."""


_PARTS = (nn.Module, Tensor, list, dict, set)


def use_copied_parts(network: nn.Module, copies: Memo) -> None:
    """Replace the functions stored in `network`, a deep copy, that use parts of the original.

    Args:
        network: the copy; it is changed.
        copies: the dictionary that `copy.deepcopy` filled.
    """
    for module in network.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, dict):  # of hooks, for example
                held = cast("MutableMapping[Any, Any]", value)
                for name, each in list(held.items()):
                    held[name] = _copied(each, copies)
            else:
                vars(module)[key] = _copied(value, copies)


def _copied(value: Any, copies: Memo) -> Any:
    """The value, or a copied function if it is a function that uses parts of the network."""
    parts = [copies[id(each)] for each in _parts_in(value, copies)]
    return _Copied(_with_copies(value, copies), parts) if parts else value


class _Copied:
    """A function that is deep-copied together with the `parts` of the network that it uses."""

    def __init__(self, function: Callable[..., Any], parts: list[Any]) -> None:
        functools.update_wrapper(self, function)
        self.function, self.parts = function, parts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: Memo) -> _Copied:
        parts = copy.deepcopy(self.parts, memo)
        return _Copied(_with_copies(self.function, memo), parts)


def _parts_in(function: object, copies: Memo, seen: tuple[object, ...] = ()) -> Iterator[object]:
    """The parts of the network that a Python function, or a function that it uses, has as a variable or default."""
    if not isinstance(function, FunctionType) or function in seen:
        return
    for each in _variables(function):
        owner = each.__self__ if isinstance(each, MethodType) else each
        if isinstance(owner, _PARTS) and id(owner) in copies:
            yield owner
        else:
            yield from _parts_in(each, copies, (*seen, function))


def _variables(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # a variable that is not set yet
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()


def _with_copies(function: Callable[..., Any], copies: Memo) -> Callable[..., Any]:
    """The function with the copies of the network's parts in place of the parts."""
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
    owner = value.__self__ if isinstance(value, MethodType) else value
    if isinstance(owner, nn.Module) or (isinstance(owner, _PARTS) and id(owner) in copies):
        return copy.deepcopy(value, copies)
    return _with_copies(value, copies) if isinstance(value, FunctionType) else value
