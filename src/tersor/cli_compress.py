"""`tersor compress`, and the tables of a front. Torch is imported inside the command, so that `--help` is fast."""

from __future__ import annotations

import filecmp
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from tersor.cli_output import described_input, plain_console, show, stop_interrupted
from tersor.core.errors import InputError
from tersor.core.target import Runtime
from tersor.progress_bars import Bars

if TYPE_CHECKING:
    from tersor.search.folder import Front
    from tersor.search.front import Point

_NAME_WIDTH = 22
"""Least columns for the names of points in the table."""
_BESIDE, _SIZES = 2, 4
"""Most batch sizes beside the other columns of the table, and in a table of latencies: they fit 80 columns."""


def _points(text: str) -> float:
    """The number of `--max-drop`."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not a number of points. Write a number such as 2.") from None


def _max_drop(default: str) -> Any:
    text = f"largest allowed drop in the metric, in points [default: {default}]"
    return typer.Option(parser=_points, metavar="<float>", help=text)


MaxDrop = Annotated[float | None, _max_drop("1 without --latency and --size, else unlimited")]
PickedDrop = Annotated[float | None, _max_drop("unlimited with --latency or --size, else that of the search")]

Latencies = Annotated[
    list[str] | None,
    typer.Option(help="latency limit per batch size: 1:2ms,128:8ms; 2ms means 1:2ms; can be repeated"),
]


def compress(
    model: Annotated[
        str, typer.Argument(help="trained network: resnet56, timm:NAME, net.py:function, ...", show_default=False)
    ],
    data: Annotated[str, typer.Option(help="image folder, CSV file, data set or file.py:function", show_default=False)],
    weights: Annotated[Path, typer.Option(help="weights of the trained network", show_default=False)],
    max_drop: MaxDrop = None,
    latency: Latencies = None,
    size: Annotated[str | None, typer.Option(help="file size limit: 0.5MB")] = None,
    runtime: Annotated[Runtime, typer.Option(help="onnxruntime or openvino")] = "onnxruntime",
    task: Annotated[
        str, typer.Option(help="task of the network: classification, segmentation, ...")
    ] = "classification",
    loss: Annotated[str | None, typer.Option(help="loss: package.module:function of (outputs, targets)")] = None,
    metric: Annotated[
        str | None, typer.Option(help="metric from 0 to 1: package.module:function of (outputs, targets)")
    ] = None,
    channels: Annotated[
        int | None, typer.Option(min=1, help="number of channels, 1 for grayscale images [default: 3]")
    ] = None,
    mean: Annotated[str | None, typer.Option(help="mean of each channel, as in training: 0.49,0.48,0.45")] = None,
    std: Annotated[str | None, typer.Option(help="standard deviation of each channel: 0.25,0.24,0.26")] = None,
    image_size: Annotated[str | None, typer.Option(help="size of the images: 224, or height,width")] = None,
    validation: Annotated[
        float | None,
        typer.Option(help="fraction of training images to hold out [default: 0.1; 0.25 for fewer than 2,000 images]"),
    ] = None,
    time: Annotated[str, typer.Option(help="search time: 45m, 90s, 2h")] = "30m",
    student: Annotated[list[str] | None, typer.Option(help="another network to try, NAME or NAME=WEIGHTS")] = None,
    pixels: Annotated[list[int] | None, typer.Option(min=8, help="another image size to try")] = None,
    augment: Annotated[
        str | None,
        typer.Option(help="augmentation: none, flip, ... [default: crop_flip; none for grayscale, flip for boxes]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="number of training images [default: all]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="random seed")] = 0,
    storage: Annotated[str | None, typer.Option(help="SQLAlchemy URL of the database [default: study.db]")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="number of Ray processes that train candidates at the same time")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="address of a Ray cluster for the workers [default: this machine]")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder to write, or to resume")] = Path("runs/compress"),
) -> None:
    """Search for a smaller, faster network within a budget. The same command resumes an interrupted search."""
    from tersor.search.compression_budget import Budget, parse_latency, parse_size, parse_time

    console = plain_console()
    megabytes = None if size is None else parse_size(size)
    budget = Budget(max_drop, parse_latency(latency or []), megabytes, parse_time(time))
    means, deviations, sides = numbers("--mean", mean), numbers("--std", std), read_size(image_size)

    with Bars(console) as bars:
        try:
            from tersor.core.device import keep_freed_memory  # below the checks of the arguments: it imports torch
            from tersor.search.compress import compress as search

            keep_freed_memory()
            result = search(
                model,
                data,
                weights=weights,
                budget=budget,
                runtime=runtime,
                task=task,
                loss=_imported(loss),
                metric=_imported(metric),
                channels=channels,
                mean=means,
                std=deviations,
                image_size=sides,
                validation=validation,
                students=student or [],
                pixels=pixels or [],
                augment=augment,
                limit=limit,
                seed=seed,
                storage=storage,
                workers=workers,
                ray_address=ray_address,
                out=out,
                progress=bars,
            )
        except KeyboardInterrupt:
            stop_interrupted(*_kept(out))
    from tersor.search.verdict_line import last_line, test_use, verdict_lines

    console.print(*verdict_lines(result.numbers), sep="\n", soft_wrap=True)
    show(console, *front_tables(result.numbers))
    lines = test_use(result.numbers), f"model.onnx takes {described_input(out / 'model.onnx')}"
    console.print(*lines, last_line(result.numbers, out), sep="\n", soft_wrap=True)


def _kept(folder: Path) -> tuple[str, str]:
    """What an interrupted search has written, and what the same command does."""
    from tersor.search.folder import MODEL, STATE, UNCHANGED

    file, original = folder / MODEL, folder / UNCHANGED
    if not (file.is_file() and (folder / STATE).is_file()):
        return "No network has been exported yet, so nothing was saved", "To start again"
    if original.is_file() and filecmp.cmp(file, original, shallow=False):
        return f"{folder} holds the search; {file} is still the original in float32", "To resume"
    return f"{folder} holds the search; the best network so far is {file}", "To resume"


def _imported(name: str | None) -> Any:
    """The function of a loss or a metric."""
    from tersor.core.import_path import import_function

    return None if name is None else import_function(name)


def numbers(option: str, text: str | None) -> list[float] | None:
    """The numbers of `0.49,0.48,0.45`."""
    try:
        return None if text is None else [float(each) for each in text.split(",")]
    except ValueError:
        raise InputError(f"{option} is '{text}'. Write numbers with commas between them.") from None


def read_size(text: str | None) -> int | list[int] | None:
    """The pixels of `224` or `160,224`, of `--image-size`."""
    if text is None:
        return None
    sides = text.split(",")
    if len(sides) > 2 or not all(each.strip().isdecimal() and int(each) for each in sides):
        raise InputError(f"--image-size is '{text}'. Write pixels: 224, or height,width such as 160,224.")
    return int(sides[0]) if len(sides) == 1 else [int(each) for each in sides]


def front_tables(front: Front, best: str = "model.onnx") -> Iterator[Table]:
    """The free baselines and the Pareto front, fastest first; with many batch sizes, latencies get separate tables.

    Args:
        front: the points.
        best: label of the best point, which has an asterisk.
    """
    sizes = list(front.points[0].latency_ms)
    groups = [sizes[start : start + _SIZES] for start in range(0, len(sizes), _SIZES)]
    groups = groups if len(sizes) <= _BESIDE else [[], *groups]
    threads = f"{front.machine.threads} thread{'' if front.machine.threads == 1 else 's'}"
    title = f"{front.machine.cpu}, {threads}, {front.minutes_used:.1f} minutes"
    caption = (
        f"* = {best}. ± is half the width of the 95 % interval. Latencies and intervals are computed from the measured "
        "ratio to the original's latency; networks with another image size are timed alone. All choices were made on "
        "validation images."
    )
    free = {point.name for point in front.baselines}
    points = [*front.baselines, *(each for each in front.points if each.name not in free)]
    for number, group in enumerate(groups):
        last = number == len(groups) - 1
        table = Table(title=None if number else title, title_justify="left", caption=caption if last else None)
        table.add_column("point", min_width=_NAME_WIDTH)
        latencies = [f"ms,\nbatch {size}" for size in group]
        for column in latencies if number else ("val., %", "test, %", *latencies, "MB"):
            table.add_column(column, justify="right")
        for point in points:
            chosen = point.name == front.best
            name = _PointName(f"{'* ' if chosen else ''}{point.name}", f"{point.runtime} {point.precision}")
            table.add_row(name, *_cells(point, group, scores=not number), style="bold" if chosen else None)
        yield table


@dataclass(frozen=True)
class _PointName:
    """A point's name over its runtime and precision. Long lines are folded after hyphens, and between words."""

    name: str
    executed: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in (self.name, self.executed):
            yield Text("\n".join(_folded(line, options.max_width)), overflow="fold")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        widest = max(len(self.name), len(self.executed))
        return Measurement(min(_NAME_WIDTH, widest), min(widest, options.max_width))


def _folded(line: str, width: int) -> list[str]:
    """The line in several of at most `width`, unless a part is longer; the asterisk stays with what follows."""
    lines = [""]
    for part in re.split(r"(?<=-)|(?<=[^*] )", line):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return [each.rstrip() for each in lines]


def _cells(point: Point, sizes: Sequence[int], *, scores: bool) -> list[str]:
    times = [point.milliseconds(size).replace(" ±", "\n±") for size in sizes]
    if not scores:
        return times
    tested = "" if point.test is None else f"{point.test:.2f}"
    return [f"{point.validation:.2f}", tested, *times, f"{point.bytes / 1e6:.3f}"]
