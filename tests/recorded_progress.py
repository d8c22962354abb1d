"""A progress reporter for tests."""

from __future__ import annotations

from dataclasses import dataclass, field

from tersor.core.progress import NullProgress


@dataclass
class Task:
    name: str
    total: int
    done: list[int] = field(default_factory=list)
    """How many items were done after each report."""


class RecordedProgress(NullProgress):
    """Records every task and line."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.lines: list[str] = []

    def start(self, task: str, total: int) -> None:
        self.tasks.append(Task(task, total))

    def advance(self, items: int = 1, **values: float) -> None:
        done = self.tasks[-1].done
        done.append(items + (done[-1] if done else 0))

    def say(self, line: str) -> None:
        self.lines.append(line)
