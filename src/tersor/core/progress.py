"""Who looks on while something long happens: a progress bar, or nobody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class ProgressReporter(Protocol):
    """Told of every long task; the command line draws it, a library caller need not care."""

    def start(self, task: str, total: int) -> None:
        """A task of `total` items begins, and the one before has ended."""
        ...

    def advance(self, items: int = 1, **values: float) -> None:
        """`items` more are done; `values` are what to show beside (losses by name, learning rate)."""
        ...

    def say(self, line: str) -> None:
        """One line that should stay on the screen."""
        ...


class NullProgress:
    """Nobody looks on."""

    def start(self, task: str, total: int) -> None:
        """Nothing."""

    def advance(self, items: int = 1, **values: float) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Progress:
    """How far the work before the first step has come: `done` of `total` items of `what`.

    What `lasts` is in the network's `state_dict` by now: begun again with it, the work goes on behind it.
    """

    what: str
    done: int
    total: int
    resumable: bool = False


Tell = Callable[[Progress], None]
"""Who is told how far work is that no generator does."""


def untold(_progress: Progress) -> None:
    """Nobody asks."""
