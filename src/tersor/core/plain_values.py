"""Records of plain values, whose constructors report all invalid values in an `InputError`. Needs no torch."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast, dataclass_transform, get_args

import pydantic
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from tersor.core.errors import InputError, missing_in, nearest

_Class = TypeVar("_Class", bound=type)

WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "path_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "dataclass_type": "a mapping",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "package.module:function",
    "too_short": "a list of length at least {min_length}",
    "too_long": "a list of length at most {max_length}",
}
"""Expected value by pydantic error type."""
UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
RAISED = ("value_error", "assertion_error")
"""pydantic error types of exceptions that a validator of the class raised."""
_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


class PlainRecord(BaseModel):
    """A pydantic model whose constructor raises an `InputError`."""

    def __init__(self, /, *unnamed: Any, **values: Any) -> None:
        if unnamed:
            names = ", ".join(type(self).model_fields)
            own = type(self).__name__
            raise InputError(f"{own} takes keyword arguments only, got {unnamed[0]!r}. Arguments: {names}.")
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise invalid(type(self), error, values) from None

    __init__.__pydantic_base_init__ = True  # pyright: ignore[reportFunctionMemberAccess]  # not called by validators


@dataclass_transform(field_specifiers=(pydantic.Field, dataclasses.field))
def plain_dataclass(*, frozen: bool = False, config: ConfigDict | None = None) -> Callable[[_Class], _Class]:
    """`pydantic.dataclasses.dataclass`, with a constructor that raises an `InputError`."""

    def decorate(cls: _Class) -> _Class:
        made: Any = pydantic.dataclasses.dataclass(frozen=frozen, config=config)(cls)
        caller = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]  # pydantic would look for names in this function
        if not made.__pydantic_complete__:
            names = {**caller.f_globals, **caller.f_locals}
            pydantic.dataclasses.rebuild_dataclass(made, raise_errors=False, _types_namespace=names)
        validated = made.__init__

        @functools.wraps(validated)
        def init(self: Any, *values: Any, **named: Any) -> None:
            try:
                validated(self, *values, **named)
            except ValidationError as error:
                raise invalid(made, error, dict(zip(made.__pydantic_fields__, values, strict=False)) | named) from None

        made.__init__ = init
        return made

    return decorate


def invalid(kind: type, error: ValidationError, values: Mapping[str, Any]) -> InputError:
    """One line for each invalid value.

    Args:
        kind: the record.
        error: the error from its constructor.
        values: the arguments of the constructor, by name.
    """
    lines: list[str] = []
    wanted: dict[str, list[str]] = {}
    given: dict[str, Any] = {}
    for detail in error.errors(include_url=False):
        path, fields = _place(kind, detail["loc"], values)
        name, value = ".".join(path), detail["input"]
        field = fields.get(path[-1]) if path else None
        if detail["type"] == "unexpected_positional_argument":
            lines.append(f"{kind.__name__} takes {len(fields)} values: {', '.join(fields)}. More were given.")
        elif detail["type"] in UNKNOWN_KEY and not fields:
            lines.append(f"{kind.__name__} has no parameter {name}.")
        elif detail["type"] in UNKNOWN_KEY:
            lines.append(str(missing_in(".".join([kind.__name__, *path[:-1]]), "parameter", path[-1], fields)))
        elif detail["type"] in ("missing", "missing_argument"):
            lines.append(f"{'.'.join([kind.__name__, *path[:-1]])} needs {path[-1]}.")
        elif detail["type"] in RAISED:
            lines.append(raised(detail, kind.__name__))
        elif detail["type"] in _OUT_OF_RANGE and field is not None and possible_range(field):
            lines.append(f"{name} is {value!r}. It must be {possible_range(field)}.")
        else:
            context = detail.get("ctx", {})
            wish = WANTED.get(detail["type"]) or detail["msg"].removeprefix("Input should be ")
            wish += f" or {context['class_name']}" if "class_name" in context else ""
            wanted.setdefault(name, []).append(wish.format(**context))
            given.setdefault(name, value)
    return InputError(
        "\n".join([*dict.fromkeys(lines), *(_should_be(name, wanted[name], given[name]) for name in wanted)])
    )


def raised(detail: Any, owner: str) -> str:
    """What an exception of a validator says.

    Args:
        detail: the error, of a type in `RAISED`.
        owner: class of the validator, for an exception without text.
    """
    return str(detail["ctx"]["error"]) or f"{owner} does not accept {detail['input']!r}."


def in_one_line(error: ValidationError) -> str:
    """pydantic's message about a user-defined record, without types and links: "Grow.rate: ..., got 3"."""
    parts: list[str] = []
    for detail in error.errors(include_url=False):
        location = ".".join(map(str, (error.title, *detail["loc"])))
        is_value = detail["loc"] and detail["type"] not in (*UNKNOWN_KEY, "missing", "missing_argument")
        parts.append(f"{location}: {detail['msg']}" + (f", got {detail['input']!r}" if is_value else ""))
    return "; ".join(parts)


def _should_be(name: str, wanted: Sequence[str], value: object) -> str:
    possible = " or ".join(dict.fromkeys(wanted))
    meant = nearest(value, re.findall(r"'([^']*)'", possible)) if isinstance(value, str) else None
    return f"{name} should be {possible}, got {value!r}.{f' Did you mean {meant!r}?' if meant else ''}"


def _place(
    kind: Any, location: tuple[int | str, ...], values: Mapping[str, Any]
) -> tuple[list[str], Mapping[str, FieldInfo]]:
    """The path of a value, without names of types that pydantic adds, and the fields of the record that holds it."""
    fields: Mapping[str, FieldInfo] = kind.__pydantic_fields__
    path: list[str] = []
    within: Any = values
    for place, part in enumerate(location):
        if isinstance(part, int) and not place:  # a positional argument
            part = [*fields, str(part)][part]
        last = place == len(location) - 1
        if isinstance(within, Mapping | Sequence) and not isinstance(within, str) and (last or _holds(within, part)):
            path.append(str(part))
            within = cast("Any", within)[part] if _holds(within, part) else None
            if not last and part in fields:
                fields = _fields_in(fields[str(part)].annotation)
    return path, fields


def _holds(values: Any, part: int | str) -> bool:
    return part in values if isinstance(values, Mapping) else isinstance(part, int) and part < len(values)


def _fields_in(annotation: Any) -> Mapping[str, FieldInfo]:
    """The fields of the records in a type: those of `Network` in `Network | None`."""
    own = cast("Mapping[str, FieldInfo]", getattr(annotation, "__pydantic_fields__", {}))
    return dict(own) | {name: field for each in get_args(annotation) for name, field in _fields_in(each).items()}


def possible_range(field: FieldInfo) -> str:
    """ "from 2 to 8", "at least 1", "above 0 and below 1": the bounds of a number; empty without any."""
    bounds: dict[type, Any] = {}
    for each in field.metadata:
        match each:
            case Ge():
                bounds[Ge] = each.ge
            case Gt():
                bounds[Gt] = each.gt
            case Le():
                bounds[Le] = each.le
            case Lt():
                bounds[Lt] = each.lt
            case _:
                pass
    if {Ge, Le} <= bounds.keys():
        return f"from {bounds[Ge]} to {bounds[Le]}"
    words = {Ge: "at least", Gt: "above", Le: "at most", Lt: "below"}
    return " and ".join(f"{word} {bounds[kind]}" for kind, word in words.items() if kind in bounds)
