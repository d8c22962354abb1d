"""How a recipe differs from that of an interrupted run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tersor.core.errors import InputError
from tersor.recipe.schema import Recipe, write
from tersor.recipe.yaml import load, plain, shown

_SHOWN = 3


def changes(before: str, recipe: Recipe) -> str:
    """The first keys that differ, with both values: `checkpoint_every: 10, now the default 200`.

    Code that `before` names is not imported, because `before` may come from another source.

    Args:
        before: the YAML text of the earlier recipe.
        recipe: the recipe to compare with.

    Returns:
        The differences; empty if there are none, or if the text is not YAML.
    """
    try:
        old = dict(_leaves(plain(load(before, "recipe.yaml"))))
    except InputError:
        return ""
    new = dict(_leaves(plain(load(write(recipe), "recipe.yaml"))))
    defaults = dict(_leaves(recipe.model_dump(mode="json")))
    keys = [key for key in {**old, **new} if key not in old or key not in new or old[key] != new[key]]
    keys = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]  # ptq, now ptq: {bits: 4}
    told = [f"{key}: {_told(old, key)}, now {_told(new, key, defaults)}" for key in keys]
    more = len(told) - _SHOWN
    return "; ".join(told[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _told(values: dict[str, Any], key: str, defaults: dict[str, Any] | None = None) -> str:
    if key in values:
        return _shown(values[key])
    return f"the default {_shown(defaults[key])}" if defaults and key in defaults else "not set"


def _shown(value: Any) -> str:
    return shown(value).removeprefix("the text ")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every scalar with its path: `stages.0.epochs`."""
    entries = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(entries, dict) or not entries:
        yield path, value
        return
    for key, each in entries.items():
        yield from _leaves(each, f"{path}.{key}".lstrip("."))
