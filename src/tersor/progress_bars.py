"""Progress bars with rate, remaining time and the named losses."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(TextColumn):
    """Items per second."""

    def render(self, task: object) -> Text:
        speed = getattr(task, "finished_speed", None) or getattr(task, "speed", None)
        return Text(f"{speed:.1f}/s" if speed else "")


class Bars:
    """A `ProgressReporter` that draws one bar for the current task and prints lines above it.

    It is a context manager: the bars disappear at its end.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(""),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, task: str, total: int) -> None:
        """Start a new bar."""
        self._task = self._progress.add_task(task, total=total, values="")

    def advance(self, items: int = 1, **values: float) -> None:
        """Advance the bar."""
        if self._task is not None:
            shown = "  ".join(f"{name} {value:.3g}" for name, value in values.items())
            self._progress.update(self._task, advance=items, values=shown)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        console = self._progress.console
        # in a file, a line stays one line
        console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=not console.is_terminal)
