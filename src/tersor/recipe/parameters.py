"""The parameters of a method, as `tersor methods NAME` lists them."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin


def parameters(method: Any) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and description of every parameter of a method class."""
    for name, field in method.__pydantic_fields__.items():
        kind = field.annotation
        yield (
            name,
            _type_name(kind),
            str(field.default),
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
