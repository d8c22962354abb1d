"""Methods of a user's attachment with names similar to those of hooks."""

from __future__ import annotations

from difflib import get_close_matches

from tersor.training.attachment import Attachment

_CUTOFF = 0.85


def misspelled_hooks(part: Attachment) -> list[str]:
    """A line for each method of `part` whose name is similar to that of a hook, such as `before_steps`."""
    kind = type(part)
    hooks = [name for name in vars(Attachment) if not name.startswith("_")]
    own = {name for each in kind.__mro__ if each.__module__.partition(".")[0] not in {"tersor", "builtins"}
           for name in vars(each) if not name.startswith("_")}  # fmt: skip
    similar = {name: get_close_matches(name, hooks, 1, _CUTOFF) for name in sorted(own - set(hooks))}
    return [
        f"{kind.__name__}.{name} is not a hook and is not called during training. Did you mean {matches[0]}?"
        for name, matches in similar.items()
        if matches
    ]
