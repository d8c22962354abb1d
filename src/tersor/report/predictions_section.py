"""Values of the report's sections on predictions: soft targets, similar classes, changed predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tersor.evaluation.results import Results

_MATRIX_CLASSES = 20
_ROWS = 20

Rows = list[tuple[str, list[tuple[str, int]]]]
"""Rows of a matrix, each with the name of the class, and the text and shade (0 to 4) of each cell."""


def class_name(numbers: Results, index: int | None) -> str:
    """The name of a class, or its number if the data has no names; empty for an image without a class."""
    if index is None:
        return ""
    names = numbers.classes
    return str(names[index]) if index < len(names) else f"class {index}"


def likeliest(probabilities: Sequence[float], names: Sequence[str]) -> str:
    """The three likeliest classes in words."""
    pairs = sorted(zip(probabilities, names, strict=True), reverse=True)[:3]
    return ", ".join(f"{name} {probability:.3f}" for probability, name in pairs)


def similarity_rows(numbers: Results, rows: Sequence[tuple[int, Sequence[float]]]) -> tuple[Rows, str]:
    """Mean soft prediction by class, in percent; the three largest wrong probabilities in words."""
    wrong = {(label, other): value for label, row in rows for other, value in enumerate(row) if other != label}
    most = max(wrong.values())
    largest = sorted(wrong, key=lambda pair: -wrong[pair])[:3]
    matrix = [
        (
            class_name(numbers, label),
            [(f"{100 * value:.1f}", 0 if label == other else _shade(value, most)) for other, value in enumerate(row)],
        )
        for label, row in rows
    ]
    return matrix, ", ".join(f"{class_name(numbers, a)} as {class_name(numbers, b)}" for a, b in largest)


def _shade(value: float, most: float) -> int:
    """1 to 4; 0 for none."""
    return int(-(-4 * value // most)) if most else 0


def change_of(example: Mapping[str, Any]) -> str:
    """ "lost" for right to wrong, "gained" for wrong to right, "other" for wrong to wrong."""
    if example["before"] == example["label"]:
        return "lost"
    return "gained" if example["after"] == example["label"] else "other"


def most_changed(classes: Iterable[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """Classes by loss of accuracy, the largest first, and a title; if there are many, only those at both ends."""
    ordered = sorted(classes, key=lambda each: (each["after"] - each["before"]) / each["images"])
    if len(ordered) <= _MATRIX_CLASSES:
        return ordered, "All classes"
    half = _ROWS // 2
    title = f"The first {half} and the last {half} of {len(ordered)} classes"
    return ordered[:half] + ordered[-half:], title


def most_changed_scores(classes: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Classes by the size of the change of their score, the largest first; if there are many, only the first."""
    size = lambda each: -1.0 if None in (each["before"], each["after"]) else abs(each["after"] - each["before"])  # noqa: E731
    return sorted(classes, key=size, reverse=True)[:_ROWS]


def change_rows(numbers: Results, changes: Sequence[Sequence[int]]) -> tuple[list[str], Rows] | None:
    """Changed predictions from class to class, with the classes; None if there are too many for a matrix."""
    classes = sorted({index for before, after, _ in changes for index in (before, after)})
    if len(classes) > _MATRIX_CLASSES:
        return None
    counts = {(before, after): count for before, after, count in changes}
    most = max(counts.values())
    rows: Rows = []
    for before in classes:
        row = [counts.get((before, after), 0) for after in classes]
        rows.append((class_name(numbers, before), [(f"{n:,}" if n else "·", _shade(n, most)) for n in row]))
    return [class_name(numbers, each) for each in classes], rows
