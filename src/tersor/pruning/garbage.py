"""Work that makes small things by the hundred thousand."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def collecting_what_is_new() -> Generator[None]:
    """The garbage collector passes over what was there before: all of torch, whenever some thousand things are made."""
    if gc.get_freeze_count():  # by the caller, or by an outer one of these
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
