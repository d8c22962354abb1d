"""Validation errors of a recipe as messages: line, given value, possible values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from tersor.core.errors import InputError, nearest, unknown
from tersor.core.plain_values import RAISED, UNKNOWN_KEY, WANTED, raised
from tersor.recipe.yaml import Located, Location, shown

_MAPPING = ("model_type", "dataclass_type")


@dataclass
class _Problem:
    node: Located
    path: str
    message: str = ""
    wanted: tuple[str, ...] = ()  # several if the value may have several types
    branch: bool = False  # one of several possible types did not match; another may have matched further

    def __str__(self) -> str:
        if self.message:
            return f"{self.node.place}: {self.message}{'' if self.message.endswith('.') else '.'}"
        value, wanted = self.node.value, " or ".join(self.wanted)
        meant = nearest(value, re.findall(r"'([^']*)'", wanted)) if isinstance(value, str) else None
        hint = f" Did you mean '{meant}'?" if meant else ""
        if "text" in self.wanted and isinstance(value, int | float):
            hint = " Put it in quotes to make it text."
        return f"{self.node.place}: {self.path} should be {wanted}, got {shown(value)}.{hint}"


def explain(error: ValidationError, tree: Located, keys: Callable[[Location], Iterable[str]]) -> InputError:
    """One line for each problem that pydantic found, with its line in the file.

    Args:
        error: the error from validating `plain(tree)`.
        tree: the result of `load`.
        keys: returns the valid keys of the mapping at a location.
    """
    problems: list[_Problem] = []
    for detail in error.errors(include_url=False):
        if detail["type"] == "too_short" and len(detail["input"]) >= detail.get("ctx", {})["min_length"]:
            continue  # pydantic counts only the valid entries; the invalid ones are reported separately
        problem = _problem(detail, tree, keys)
        same = [p for p in problems if p.node is problem.node and p.wanted and problem.wanted]
        if same:
            same[0].wanted += tuple(wish for wish in problem.wanted if wish not in same[0].wanted)
        else:
            problems.append(problem)
    kept = [p for p in problems if not p.branch or not any(other.path.startswith(f"{p.path}.") for other in problems)]
    return InputError("\n".join(str(problem) for problem in sorted(kept, key=lambda p: p.node.line)))


def _problem(detail: Any, tree: Located, keys: Callable[[Location], Iterable[str]]) -> _Problem:
    kind, location, context = detail["type"], detail["loc"], detail.get("ctx", {})
    node, path, branch = _find(tree, location)
    if kind in UNKNOWN_KEY:
        return _Problem(node, path, str(unknown("key", location[-1], keys(location[:-1]))))
    if kind == "missing" and isinstance(location[-1], str):
        message = f"{path or 'the recipe'} needs '{location[-1]}'."
        return _Problem(node, f"{path}.{location[-1]}".lstrip("."), message)
    if kind == "missing":
        return _Problem(node, path, wanted=(f"a list of at least {location[-1] + 1} values",))
    if kind in RAISED:
        return _Problem(node, path, raised(detail, path))
    wanted = str(WANTED.get(kind) or detail["msg"].removeprefix("Input should be ")).format(**context)
    if kind in _MAPPING:
        wanted = f"a mapping with the keys {', '.join(keys(location))}"
    return _Problem(node, path or "a recipe", wanted=(wanted,), branch=branch)


def _find(tree: Located, location: Location) -> tuple[Located, str, bool]:
    """The value at `location`, its path, and whether pydantic's location ends in a type name."""
    node, path, beside = tree, [], False
    for part in location:
        entries = _entries(node)
        if part in entries:
            node = entries[part]
            path.append(str(part))
            beside = False
        else:  # pydantic adds the name of the type that it tried
            beside = True
    return node, ".".join(path), beside


def _entries(node: Located) -> dict[Any, Located]:
    if isinstance(node.value, list):
        return dict(enumerate(node.value))
    return node.value if isinstance(node.value, dict) else {}
