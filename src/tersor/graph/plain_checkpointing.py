"""Activation checkpointing (`torch.utils.checkpoint`) is left out of a captured graph: its parts run as plain calls.

torch.export would record them as regions without gradients, and no layer before or inside could be trained.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch.utils import checkpoint


class _PlainCall:
    @staticmethod
    def apply(function: Callable[..., Any], _preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _without_hooks(*_args: Any, **_kwargs: Any) -> Generator[None]:
    yield


_PLAIN = {
    "CheckpointFunction": _PlainCall,
    "_checkpoint_without_reentrant_generator": _without_hooks,
    "_checkpoint_without_reentrant_generator_impl": _without_hooks,
}
"""What takes the place of what `torch.utils.checkpoint` uses; older releases have one of the generators."""


@contextmanager
def without_checkpointing() -> Generator[None]:
    """Context in which checkpointed parts of a forward method run as plain calls."""
    before = {name: getattr(checkpoint, name) for name in _PLAIN if hasattr(checkpoint, name)}
    for name in before:
        setattr(checkpoint, name, _PLAIN[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(checkpoint, name, value)
