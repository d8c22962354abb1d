"""The result of a search: the Pareto front, the best point, and the points for other budgets. Does not import torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import ConfigDict

from tersor.core.errors import InputError, nearest, unknown
from tersor.core.files import replacing
from tersor.search.compression_budget import Budget
from tersor.search.folder import MODEL, Front
from tersor.search.front import Point, pick, shortfall, violations
from tersor.search.verdict_line import last_line, verdict_lines


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
            InputError: `path` is not an .onnx file in an existing folder, or cannot be written; the file of the point
                is missing.
        """
        path = Path(path)
        if path.suffix != ".onnx" or not path.parent.is_dir():
            raise InputError(f"cannot write {path}. Possible: an .onnx file in an existing folder.")
        if not self.file.is_file():
            raise InputError(
                f"{self.file} is missing from the folder of the search. Copy the folder again, or choose another point."
            )
        try:
            with replacing(path) as partial:
                shutil.copyfile(self.file, partial)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}.") from error
        return path


@dataclass(frozen=True)
class PickedPoint:
    """What `tersor pick` prints with `--json`."""

    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True)
    budget: str
    """The budget in words."""
    met: bool
    """Whether the point meets the budget on the validation images."""
    shortfall: str
    """The limits that the point exceeds, in words; empty if it meets the budget."""
    point: Point
    """The point that was chosen."""
    file: Path
    """Its ONNX file: that of `--out`, else the one in the folder of the search."""


@dataclass(frozen=True)
class Result:
    """The folder of a search, as read from its `front.json`. `print(result)` shows the verdict.

    Attributes:
        folder: the folder.
        numbers: the content of `front.json`: all points, and why a candidate has none (`failed`, `dropped`).
    """

    folder: Path
    numbers: Front

    def __str__(self) -> str:
        """The verdict: what was gained and lost, why this point was chosen, and the files."""
        return "\n".join([*verdict_lines(self.numbers), last_line(self.numbers, self.folder)])

    @property
    def best(self) -> Choice:
        """The point in `model.onnx`."""
        return Choice(self.numbers.point(self.numbers.best), self.folder / MODEL, self.numbers.shortfall)

    @property
    def front(self) -> list[Point]:
        """The Pareto front, from the fastest to the slowest network."""
        return self.numbers.points

    def pick(self, budget: Budget | None = None, *, point: str | None = None, **limits: object) -> Choice:
        """The best point for a budget (the closest if none meets it), or the point with this name. Nothing is trained.

        Args:
            budget: the budget; that of the search by default.
            point: the name of a point instead of a budget.
            limits: limits as keywords instead of a `Budget`: `max_drop`, `latency_ms`, `megabytes`.

        Raises:
            InputError: there is no such limit, point or batch size; a limit has an invalid value; or more than one of
                a budget, a point and limits are given.
        """
        own = Budget.of_numbers(self.numbers.limits)
        _check(budget, point, limits)
        if point is not None:
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
        if name in points:
            return points[name]
        similar, free = nearest(name, points), [point.name for point in numbers.baselines]
        shown = dict.fromkeys([*(point.name for point in self.front), *free])
        hint = f" Did you mean {similar}?" if similar else ""
        others = f" report.html has {len(points) - len(shown)} more." if len(points) > len(shown) else ""
        raise InputError(
            f"{self.folder} has no point '{name}'.{hint} Points of the Pareto front, and baselines that need no "
            f"search: {', '.join(shown)}.{others}"
        )


def _check(budget: Budget | None, point: str | None, limits: Mapping[str, object]) -> None:
    """Check that the arguments of `pick` name one choice.

    Raises:
        InputError: they do not.
    """
    possible = [each.name for each in fields(Budget) if each.name != "minutes"]
    for name in limits:
        if name not in possible:
            raise unknown("limit", name, possible)
    if budget is not None and not isinstance(budget, Budget):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"budget is of type {type(budget).__name__}. Pass tersor.Budget(max_drop=0.5), or max_drop=0.5."
        )
    if point is not None and (budget is not None or limits):
        raise InputError(f"the point {point} and limits are given. Give either the name of a point or limits.")
    if budget is not None and limits:
        raise InputError(f"a budget and {', '.join(limits)} are given. Give either a budget or limits.")
