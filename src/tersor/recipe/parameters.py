"""The parameters of a method, as `tersor methods NAME` lists them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter


@dataclass(frozen=True)
class MethodDescription:
    """A method, as `tersor methods --json` prints it."""

    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True)
    documentation: str
    """Formula and paper."""
    needs_teacher: bool
    """Whether the method, with its default parameters, needs a teacher."""
    needs_steps: bool
    """Whether the method, with its default parameters, needs training."""
    parameters: Mapping[str, Any]
    """JSON schema of the parameters in a recipe."""
    example: Mapping[str, Any]
    """Parameters for a small network."""


def describe(method: Any) -> MethodDescription:
    """Everything that a program needs to use a method class."""
    fields = method.__pydantic_fields__.values()
    by_default = method if any(field.is_required() for field in fields) else method()
    return MethodDescription(
        documentation(method),
        getattr(by_default, "needs_teacher", False) is True,
        getattr(by_default, "needs_steps", False) is True,
        TypeAdapter(method).json_schema(),
        getattr(method, "example", {}),
    )


def documentation(method: Any) -> str:
    """The docstring of the file of a method, or that of the class if the file has none."""
    return inspect.cleandoc(sys.modules[method.__module__].__doc__ or method.__doc__ or "")


def parameters(method: Any) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and description of every parameter of a method class."""
    for name, field in method.__pydantic_fields__.items():
        kind = field.annotation
        yield (
            name,
            _type_name(kind),
            "required" if field.is_required() else str(field.get_default(call_default_factory=True)),
            field.description or "",
        )


def _type_name(kind: Any) -> str:
    """A type as a user would write it: "minmax, mse or none"."""
    if kind is type(None):
        return "none"
    if get_origin(kind) is Annotated:
        return _type_name(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_type_name, get_args(kind)))
    return getattr(kind, "__name__", str(kind)) if get_origin(kind) is None else str(kind).replace("typing.", "")
