"""Progress of long work: the one channel through which everything reports it."""

from __future__ import annotations

import warnings
from typing import Protocol

from tersor.core.errors import CompressionWarning

WARNING = "warning: "
"""Begins the line of a warning, after the name of a stage."""


class ProgressReporter(Protocol):
    """Receives the progress of every long task. The command line draws bars from it."""

    def start(self, task: str, total: int) -> None:
        """Start a task of `total` items; the previous task has ended."""
        ...

    def advance(self, items: int = 1, **values: float) -> None:
        """Report that `items` more are done, with values to display (losses by name, learning rate)."""
        ...

    def say(self, line: str) -> None:
        """Print a line that stays on the screen."""
        ...


class NullProgress:
    """Ignores all progress."""

    def start(self, task: str, total: int) -> None:
        """Do nothing."""

    def advance(self, items: int = 1, **values: float) -> None:
        """Do nothing."""

    def say(self, line: str) -> None:
        """Do nothing."""


class WarningProgress(NullProgress):
    """Issues each line that is a warning as a `CompressionWarning`, and ignores all other progress."""

    def say(self, line: str) -> None:
        """Issue a `CompressionWarning` if the line is a warning."""
        stage, mark, text = line.rpartition(WARNING)
        if mark:
            warnings.warn(f"{stage}{text}", CompressionWarning, stacklevel=2)


NO_PROGRESS = NullProgress()


class StageProgress:
    """Prefixes every task and line with the name of a stage."""

    def __init__(self, stage: str, progress: ProgressReporter) -> None:
        self._stage, self._progress = stage, progress

    def start(self, task: str, total: int) -> None:
        """Start a task of the stage."""
        self._progress.start(f"{self._stage}: {task}", total)

    def advance(self, items: int = 1, **values: float) -> None:
        """Report that `items` more are done."""
        self._progress.advance(items, **values)

    def say(self, line: str) -> None:
        """Print a line of the stage."""
        self._progress.say(f"{self._stage}: {line}")
