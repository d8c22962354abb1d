"""The tables of `tersor bench`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from tersor.cli_output import speedup_cell, until

if TYPE_CHECKING:
    from tersor.evaluation.timings import Ratio
    from tersor.pipeline.bench import Compared, LatencyTable, TimedFile

_COLUMNS: tuple[tuple[Compared, ...], ...] = (("original", "first"), ("baseline", "first_fastest"))
"""What each of two columns of speedups compares with: files of a folder, else the first file."""
_TITLE_WIDTH = 14
"""Most columns for the name of a file in the title of a column."""


def latency_tables(measured: LatencyTable, seconds: float) -> Iterator[Table]:
    """The latencies of one batch size. With several folders, or a folder and ONNX files, also the speedups over the
    artifact of the first folder."""
    ended = until(measured.ended_by, seconds)
    title = f"batch {measured.batch_size}, {measured.images}: {measured.rounds} rounds, {ended}"
    rows: list[tuple[TimedFile, Sequence[str]]] = []
    for each in measured.files:
        spread = each.latency_ms
        milliseconds = f"{spread.median:.3f}\n({spread.p10:.3f} to\n{spread.p90:.3f})"
        rows.append((each, [milliseconds, *_compared(each)]))
    copies = [
        f"{copy} is identical to {each.file}, so it is timed once."
        for each in {each.file: each for each in measured.files}.values()
        for copy in each.copies
    ]
    yield _table(title, ["median ms\n(p10 to\np90)", *_compared_with(measured)], rows, "\n".join(copies))
    model = next((each for each in measured.files if "model" in each.roles), None)
    if model is not None:
        yield _beside_first(measured, model)


def _beside_first(measured: LatencyTable, model: TimedFile) -> Table:
    """Speedups over the artifact of the first folder."""
    folder = Path(model.file).parent
    title = f"batch {measured.batch_size}, compared with {model.file} in {model.runtime}"
    rows = [(each, [_speedup(each.speedup["model"])]) for each in measured.files if "model" in each.speedup]
    caption = (
        "In the table above, files in a folder are compared with the original and the baseline of their own folder; "
        f"single ONNX files are compared with the original and the baseline of {folder}."
    )
    return _table(title, [f"vs. {_in_title(Path(model.file))}"], rows, caption)


def _table(title: str, columns: Sequence[str], rows: Sequence[tuple[TimedFile, Sequence[str]]], caption: str) -> Table:
    """A table of files. If it is too wide, only the column of names gets narrower."""
    table = Table(title=title, caption=caption or None, title_justify="left", caption_justify="left")
    table.add_column("file")
    cells = [[_executed(file), *others] for file, others in rows]
    for number, column in enumerate(["runtime", *columns]):
        lines = [*column.split(), *(line for row in cells for line in row[number].splitlines())]
        table.add_column(column, width=max(map(len, lines)))
    for (file, _), row in zip(rows, cells, strict=True):
        table.add_row(_FileName(file.file, f"{file.bytes / 1e6:.3f} MB"), *row)
    return table


def _executed(file: TimedFile) -> str:
    """How a file runs."""
    return f"{file.runtime}\n{file.precision}".replace(", ", ",\n").replace(" and ", "\nand ")


def _speedup(ratio: Ratio) -> str:
    """A speedup over its interval, in short lines."""
    text = speedup_cell(ratio)
    return text.replace("no measurable ", "no measurable\n").replace("x to ", "x to\n")


def _in_title(file: Path) -> str:
    """The name of a file in the title of a column; that of a folder's artifact with the folder."""
    name = f"{file.parent.name}/{file.name}" if file.name == "model.onnx" else file.name
    return "\n".join(_folded(name, _TITLE_WIDTH))


class _FileName:
    """A path and a size. Long paths are folded after slashes; names that are too long after hyphens and the like."""

    def __init__(self, path: str, size: str) -> None:
        self.path, self.size = path, size

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("\n".join([*_folded(self.path, options.max_width), self.size]), overflow="fold")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        widest = max(len(self.path), len(self.size))
        return Measurement(len(self.size), min(widest, options.max_width))


def _folded(path: str, width: int) -> list[str]:
    """The path in several lines of at most `width`, unless a part without hyphens is longer."""
    lines = [""]
    for name in re.split(r"(?<=/)", path):
        parts = [name] if len(name) <= width else re.split(r"(?<=[-_ ])|(?=\.)", name)
        for part in parts:
            if lines[-1] and len(lines[-1]) + len(part) > width:
                lines.append("")
            lines[-1] += part
    return lines


def _compared_with(measured: LatencyTable) -> tuple[str, str]:
    """The titles of the two columns of speedups: the original and the baseline of folders, else the first file."""
    first = next((each for each in measured.files if "first" in each.roles), None)
    if first is None:
        return "vs. original", "vs. baseline"
    name = _in_title(Path(first.file))
    return f"vs. {name} in {first.runtime}", f"vs. {name} in its fastest runtime"


def _compared(file: TimedFile) -> Sequence[str]:
    """The two speedups of a file over the reference files; for a reference file, its role in place of the speedup."""
    shown = {"original": "original", "baseline": "baseline", "first": "this file", "first_fastest": "this file"}
    return [
        "".join(
            _speedup(file.speedup[role]) if role in file.speedup else shown[role]
            for role in column
            if role in file.speedup or role in file.roles
        )
        for column in _COLUMNS
    ]
