"""Who looks on while something long happens: a progress bar, or nobody."""

from __future__ import annotations

from typing import Protocol


class Watch(Protocol):
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


class Unwatched:
    """Nobody looks on."""

    def start(self, task: str, total: int) -> None:
        """Nothing."""

    def advance(self, items: int = 1, **values: float) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""
