"""CSV files of image paths and their classes or values."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tersor.core.errors import InputError, counted, without_function
from tersor.data.decoding import ImageFormat, read_file
from tersor.data.image_sets import Decoded, Splits, View
from tersor.data.splitting import with_test_set

_EXAMPLE = "'path,value', 'path,class' or 'path,classes' (such as cat;dog), each optionally with a column 'split'"
_SETS = ("train", "val", "test")
Row = tuple[int, dict[str, str]]


def from_csv(path: Path, form: ImageFormat) -> Splits:
    """Load the images that a CSV file with a header lists.

    The column `path` is relative to the folder of the file. The column `class` holds one class for each image,
    `classes` any number, separated by semicolons; the targets are then 0 or 1 for each class, (N, classes) float32.
    Without either, all other columns are numbers: values (N, columns) float32. The column `split` says train, val or
    test; without it, a fifth of the images is the test set, always the same.

    Raises:
        InputError: the file is missing or empty, or a row is incomplete or invalid.
    """
    columns, rows = _rows(path)
    if "class" in columns or "classes" in columns:
        column = "class" if "class" in columns else "classes"
        if columns != [column]:
            raise InputError(f"'{path}' has the columns {', '.join(columns)}. Possible: {_EXAMPLE}.")
        targets, names = _labels(path, rows, column)
    else:
        targets, names = _values(path, rows, columns), tuple(columns)
    files = [str(path.parent / row["path"]) for _, row in rows]
    images = Decoded(targets, lambda number: read_file(files[number], form))
    if "split" not in rows[0][1]:
        return with_test_set(images, names)
    train, validation, test = (
        View(
            images,
            torch.tensor([place for place, (_, row) in enumerate(rows) if row["split"] == which], dtype=torch.int64),
        )
        for which in _SETS
    )
    return Splits(train, validation, test, names)


def _rows(path: Path) -> tuple[list[str], list[Row]]:
    """The columns of targets, and the number and the cells of each line."""
    if not path.is_file():
        raise InputError(f"'{path}' does not exist or is not a file. Correct the path.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            header = list(reader.fieldnames or [])
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"'{path}' is not a CSV file in UTF-8: {error}. Convert it.") from error
    columns = [name for name in header if name not in {"path", "split"}]
    if "path" not in header or not columns or len({*header}) < len(header):
        if path.suffix == ".py":
            raise without_function(str(path), "a function that returns the images")
        begins = f"'{path}' begins with {', '.join(header) or 'nothing'}"
        raise InputError(f"{begins}. Begin with a header, each name once: {_EXAMPLE}.")
    if not rows:
        raise InputError(f"'{path}' lists no images. Write one line for each.")
    for line, row in rows:
        cells = sum(row[name] is not None for name in header) + len(row.get(None, ""))
        if cells != len(header):
            what = f"{counted(cells, 'cell')}. Write {len(header)}: {', '.join(header)}."
            raise InputError(f"'{path}', line {line} has {what}")
        if not row["path"]:
            raise InputError(f"'{path}', line {line}: path is empty. Write the path of an image.")
        if row.get("split", "train") not in _SETS:
            raise InputError(f"'{path}', line {line}: split is '{row['split']}'. Possible: {', '.join(_SETS)}.")
    return columns, rows


def _labels(path: Path, rows: Sequence[Row], column: str) -> tuple[Tensor, tuple[str, ...]]:
    """Class indices (N,), or 0 or 1 for each class (N, classes); and the names of the classes, sorted."""
    given = [[name.strip() for name in row[column].split(";") if name.strip()] for _, row in rows]
    names = sorted({name for each in given for name in each})
    number_of = {name: number for number, name in enumerate(names)}
    if column == "class":
        for (line, row), each in zip(rows, given, strict=True):
            if len(each) != 1:
                raise InputError(
                    f"'{path}', line {line}: class is '{row[column]}'. Write one class, or rename the column 'class' "
                    "to 'classes'."
                )
        return torch.tensor([number_of[each[0]] for each in given]), tuple(names)
    present = torch.zeros(len(rows), len(names))
    for place, each in enumerate(given):
        present[place, [number_of[name] for name in each]] = 1
    return present, tuple(names)


def _values(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> Tensor:
    """(N, columns) float32."""
    values: list[list[float]] = []
    for line, row in rows:
        try:
            values.append([float(row[column]) for column in columns])
        except ValueError as error:
            raise InputError(
                f"'{path}', line {line}: {error}. Write numbers. If the column holds classes, call it class or classes."
            ) from error
        if not all(map(math.isfinite, values[-1])):
            raise InputError(f"'{path}', line {line}: a value is not finite. Write a number, or remove the line.")
    return torch.tensor(values)
