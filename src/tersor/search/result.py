"""The result of a search: the Pareto front, the best point, and the points for other budgets. Does not import torch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tersor.core.errors import InputError
from tersor.search.compression_budget import Budget
from tersor.search.folder import MODEL, Front
from tersor.search.front import Point, pick, shortfall, violations


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

    def pick(self, budget: Budget | None = None, *, point: str | None = None, **limits: object) -> Choice:
        """The best point for a budget (the closest one if none meets it), or the point of a name. Nothing is trained.

        Args:
            budget: the budget; that of the search by default.
            point: the name of a point instead of a budget.
            limits: the parts of a budget instead of a `Budget`: `max_drop`, `latency_ms`, `megabytes`.

        Raises:
            InputError: the budget is not possible, or has a batch size that was not measured; there is no such point,
                or limits are given as well.
        """
        own = Budget.of_numbers(self.numbers.limits)
        if point is not None:
            if budget is not None or limits:
                raise InputError(f"the point {point} and limits are given. Give either the name of a point or limits.")
            return self._choice(self._named(point), own)
        if budget is None:
            budget = Budget(**limits) if limits else own  # pyright: ignore[reportArgumentType]
        measured = set(self.front[0].latency_ms)
        if unknown := set(budget.latency_ms) - measured:
            raise InputError(
                f"latency was not measured at batch {unknown.pop()}. Possible: {', '.join(map(str, sorted(measured)))}."
            )
        return self._choice(pick(self._candidates(budget), budget, self._original), budget)

    def _candidates(self, budget: Budget) -> list[Point]:
        """The front; where none of it meets the budget also the points that do, although they are only equal to it."""

        def meets(point: Point) -> bool:
            return not violations(point, budget, self._original)

        if any(map(meets, self.front)):
            return self.front
        return [*self.front, *filter(meets, self.numbers.dominated)]

    @property
    def _original(self) -> float:
        return self.numbers.point(self.numbers.original).validation

    def _choice(self, point: Point, budget: Budget) -> Choice:
        return Choice(point, self.folder / point.file, shortfall(point, budget, self._original))

    def _named(self, name: str) -> Point:
        numbers = self.numbers
        points = {point.name: point for point in (*numbers.baselines, *numbers.dominated, *numbers.points)}
        if name not in points:
            names = ", ".join(point.name for point in self.front)
            raise InputError(f"{self.folder} has no point {name}. The points of the front: {names}.")
        return points[name]
