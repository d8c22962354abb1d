"""The result of a search: the Pareto front, the best point, and the points for other budgets. Does not import torch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tersor.core.errors import InputError
from tersor.search.compression_budget import Budget
from tersor.search.folder import MODEL, Front
from tersor.search.front import Point, pick, shortfall


@dataclass(frozen=True)
class Choice:
    """A point of the front.

    Attributes:
        point: its numbers.
        file: its ONNX file.
        shortfall: the limits that it exceeds, in words; empty if it meets the budget.
    """

    point: Point
    file: Path
    shortfall: str

    def export(self, path: Path | str) -> Path:
        """Copy the ONNX file.

        Raises:
            InputError: `path` is not an .onnx file in an existing folder.
        """
        path = Path(path)
        if path.suffix != ".onnx" or not path.parent.is_dir():
            raise InputError(f"cannot write {path}. Possible: an .onnx file in an existing folder.")
        shutil.copyfile(self.file, path)
        return path


@dataclass(frozen=True)
class Result:
    """The folder of a search, as read from its `front.json`."""

    folder: Path
    numbers: Front

    @property
    def best(self) -> Choice:
        """The point in `model.onnx`."""
        return Choice(self.numbers.point(self.numbers.best), self.folder / MODEL, self.numbers.shortfall)

    @property
    def front(self) -> list[Point]:
        """The Pareto front, from the fastest to the slowest network."""
        return self.numbers.points

    def pick(self, budget: Budget | None = None, **limits: object) -> Choice:
        """The best point for a budget, without new training; the nearest one if none meets it.

        Args:
            budget: the budget; that of the search by default.
            limits: or its parts: `max_drop`, `latency_ms`, `megabytes`.

        Raises:
            InputError: the budget is not possible, or has a batch size that was not measured.
        """
        if budget is None:
            own = Budget.of_numbers(self.numbers.limits)
            budget = Budget(**limits) if limits else own  # pyright: ignore[reportArgumentType]
        measured = set(self.front[0].latency_ms)
        if unknown := set(budget.latency_ms) - measured:
            raise InputError(
                f"latency was not measured at batch {unknown.pop()}. Possible: {', '.join(map(str, sorted(measured)))}."
            )
        original = self.numbers.point(self.numbers.original).validation
        point = pick(self.front, budget, original)
        return Choice(point, self.folder / point.file, shortfall(point, budget, original))
