"""Values of the report's sections on predictions: soft targets, similar classes, changed predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tersor.report.charts import Columns
from tersor.report.templating import signed
from tersor.report.verdict import Numbers

_MATRIX_CLASSES = 20
_ROWS = 20


def class_name(numbers: Numbers, index: int) -> str:
    """The name of a class, or its number if the data has no names."""
    names = numbers.get("classes") or ()
    return str(names[index]) if index < len(names) else f"class {index}"


@dataclass(frozen=True)
class Matrix:
    """A table of classes by classes; a cell is its text and its shade from 0 to 4."""

    classes: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[str, int]]]]


def class_similarity(numbers: Numbers, similarity: Mapping[str, Any]) -> tuple[Matrix, str]:
    """Mean soft prediction by class, with the three largest wrong probabilities in words."""
    classes = range(len(similarity["rows"][0][1]))
    wrong = {(label, other): row[other] for label, row in similarity["rows"] for other in classes if other != label}
    most = max(wrong.values())
    largest = sorted(wrong, key=lambda pair: -wrong[pair])[:3]
    rows = [
        (
            class_name(numbers, label),
            [(f"{100 * row[other]:.1f}", 0 if label == other else _shade(row[other], most)) for other in classes],
        )
        for label, row in similarity["rows"]
    ]
    pairs = ", ".join(f"{class_name(numbers, label)} as {class_name(numbers, other)}" for label, other in largest)
    return Matrix([class_name(numbers, each) for each in classes], rows), pairs


def _shade(value: float, most: float) -> int:
    """1 to 4; 0 for none."""
    return int(-(-4 * value // most)) if most else 0


@dataclass(frozen=True)
class SoftTarget:
    """Softened predictions of one image; `rows` are temperature, entropy in bits, columns, and a description."""

    image: Mapping[str, Any]
    names: Sequence[str]
    rows: Sequence[tuple[float, float, Columns, str]]


def soft_targets(numbers: Numbers, images: Sequence[Mapping[str, Any]]) -> list[SoftTarget]:
    """One for each image."""
    targets: list[SoftTarget] = []
    for image in images:
        names = [class_name(numbers, each) for each in image["classes"]]
        rows: list[tuple[float, float, Columns, str]] = []
        for row in image["rows"]:
            pairs = list(zip(row["probabilities"], names, strict=True))
            likeliest = ", ".join(f"{name} {value:.3f}" for value, name in sorted(pairs, reverse=True)[:3])
            groups = [(name, {"teacher": value}) for value, name in pairs]
            rows.append((row["temperature"], row["entropy"], groups, f"T = {row['temperature']}: {likeliest}"))
        targets.append(SoftTarget(image, names, rows))
    return targets


def resolution_titles(count: int) -> list[str]:
    """Column titles of the attention maps."""
    return [f"resolution {number}" for number in range(1, count + 1)]


def change_of(example: Mapping[str, Any]) -> str:
    """ "lost" for right to wrong, "gained" for wrong to right, "other" for wrong to wrong."""
    if example["before"] == example["label"]:
        return "lost"
    return "gained" if example["after"] == example["label"] else "other"


@dataclass(frozen=True)
class ClassAccuracy:
    """Of one class: how many images, accuracies in percent before and after, and the change in points."""

    name: str
    images: int
    before: float
    after: float
    change: str


def class_accuracies(numbers: Numbers, classes: Sequence[Mapping[str, Any]]) -> tuple[list[ClassAccuracy], str]:
    """Ordered from the largest loss; of many classes, those with the largest changes. With a title."""
    ordered = sorted(classes, key=lambda each: (each["after"] - each["before"]) / each["images"])
    few = len(ordered) <= _MATRIX_CLASSES
    rows: list[ClassAccuracy] = []
    for each in ordered if few else ordered[: _ROWS // 2] + ordered[-_ROWS // 2 :]:
        before, after = (100 * each[key] / each["images"] for key in ("before", "after"))
        name = class_name(numbers, each["class"])
        rows.append(ClassAccuracy(name, each["images"], before, after, signed(after - before, "", 1)))
    return rows, "All classes" if few else f"The {_ROWS} classes with the largest changes"


def change_matrix(numbers: Numbers, changes: Sequence[Sequence[int]]) -> Matrix | None:
    """Changed predictions from class to class; None if there are none or too many classes for a matrix."""
    classes = sorted({index for before, after, _ in changes for index in (before, after)})
    if not 0 < len(classes) <= _MATRIX_CLASSES:
        return None
    counts = {(before, after): count for before, after, count in changes}
    most = max(counts.values())
    rows = [
        (
            class_name(numbers, before),
            [(f"{count:,}" if count else "·", _shade(count, most)) for count in
             (counts.get((before, after), 0) for after in classes)],
        )
        for before in classes
    ]  # fmt: skip
    return Matrix([class_name(numbers, each) for each in classes], rows)


def frequent_changes(numbers: Numbers, changes: Sequence[Sequence[int]]) -> list[tuple[str, str, int]]:
    """The most frequent changes: original class, artifact's class, images."""
    return [
        (class_name(numbers, before), class_name(numbers, after), count) for before, after, count in changes[:_ROWS]
    ]
