"""The command line. Torch is imported inside the commands that need it, so that `--help` is fast."""

from __future__ import annotations

import json
import os
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from tersor import cli_compress, cli_pick
from tersor.cli_bench import latency_tables
from tersor.cli_output import (
    Document,
    described_input,
    plain_console,
    print_json,
    results_tables,
    schema_of,
    sensitivity_table,
    show,
)
from tersor.core.errors import InputError, ProcessLost
from tersor.core.resources import enough_memory
from tersor.progress_bars import Bars
from tersor.tracking import TrackerName, tracked

if TYPE_CHECKING:
    from tersor.recipe import Recipe

app = typer.Typer(
    name="tersor",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
console = plain_console()
_INTERRUPTED = 130


def _tables_to_stderr(as_json: bool) -> bool:
    """With --json, stdout is for the document alone."""
    console.stderr = as_json
    return as_json


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(version("tersor"))
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Compress PyTorch vision models: distill, prune, quantize, export to ONNX, and measure the result."""


RecipeFile = Annotated[Path, typer.Argument(help="recipe file (YAML)", show_default=False)]
ChangedValues = Annotated[list[str] | None, typer.Option("--set", help="override a value: stages.0.epochs=3")]
Json = Annotated[
    bool,
    typer.Option("--json", callback=_tables_to_stderr, help="print a JSON document on stdout, the rest on stderr"),
]


@app.command()
def run(
    recipe: RecipeFile,
    out: Annotated[Path | None, typer.Option(help="folder to write; it must not exist [default: runs/NAME]")] = None,
    set_: ChangedValues = None,
    resume: Annotated[bool, typer.Option("--resume", help="resume an interrupted run")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="describe the run without training")] = False,
    track: Annotated[
        TrackerName | None, typer.Option(help="log losses and accuracy to tensorboard or mlflow", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a recipe and write one folder: model, original, report and measurements."""
    from tersor.recipe import read

    checked = read(recipe, set_ or [])
    if explain:
        if as_json:
            raise InputError("--explain writes text. Leave out --json or --explain.")
        _explain(checked)
        return
    from tersor.core import distributed
    from tersor.core.device import keep_freed_memory
    from tersor.pipeline.run import run as walk

    out = out or Path("runs") / recipe.stem
    keep_freed_memory()
    with Bars(console) as bars, tracked(bars, track, out.with_name(f"{out.name}.tracking")) as progress:
        try:
            folder = walk(checked, out=out, resume=resume, progress=progress)
        except KeyboardInterrupt:
            how = "the same command" if distributed.count() > 1 else f"tersor {shlex.join(sys.argv[1:])}"
            _say(f"interrupted. To resume: {how}{'' if resume else ' --resume'}")
            raise typer.Exit(_INTERRUPTED) from None
    if distributed.rank():
        return
    from tersor.evaluation.results import Results

    numbers = (folder / "numbers.json").read_text()
    results = Results.model_validate_json(numbers)
    console.print(f"results are in {folder / 'report.html'}", soft_wrap=True)
    show(console, *results_tables(results))
    console.print(f"written: {folder}; model.onnx takes {described_input(folder / 'model.onnx')}", soft_wrap=True)
    if as_json:
        sys.stdout.write(numbers)


app.command()(cli_compress.compress)
app.command()(cli_pick.pick)


@app.command()
def sensitivity(
    recipe: RecipeFile,
    out: Annotated[Path | None, typer.Option(help="file to write or resume [default: NAME.sensitivity.json]")] = None,
    set_: ChangedValues = None,
    images: Annotated[int | None, typer.Option(min=1, help="number of validation images [default: all]")] = None,
    as_json: Json = False,
) -> None:
    """Measure the sensitivity of each layer to each bit width, and draw a figure."""
    from tersor.pipeline.sensitivity_analysis import measure
    from tersor.recipe import read

    checked = read(recipe, set_ or [])
    out = out or Path(f"{recipe.stem}.sensitivity.json")
    with Bars(console) as bars:
        try:
            found, figure = measure(checked, out=out, images=images, progress=bars)
        except KeyboardInterrupt:
            _say(f"interrupted. To resume: tersor {shlex.join(sys.argv[1:])}")
            raise typer.Exit(_INTERRUPTED) from None
    show(console, sensitivity_table(found))
    console.print(f"written: {out} and {figure}", soft_wrap=True)
    if as_json:
        print_json(found)


@app.command("eval")
def evaluate(
    artifact: Annotated[Path, typer.Argument(help="folder of a run or a search, or ONNX file", show_default=False)],
    data: Annotated[
        str | None, typer.Option(help="image folder, CSV file, data set or file.py:function [default: from the recipe]")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(help="onnxruntime or openvino [default: as in the recipe or file]")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="task of the network: classification, segmentation, ... [default: from the recipe]"),
    ] = None,
    channels: Annotated[
        int | None, typer.Option(min=1, help="number of channels, 1 for grayscale images [default: from the file]")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="mean of each channel, as in training: 0.49,0.48,0.45 [default: from the file]")
    ] = None,
    std: Annotated[str | None, typer.Option(help="standard deviation: 0.25,0.24,0.26 [default: from the file]")] = None,
    image_size: Annotated[str | None, typer.Option(help="size: 224, or height,width [default: from the file]")] = None,
    as_json: Json = False,
) -> None:
    """Measure an artifact on test images in its runtime: accuracy, or the metric of its task."""
    from tersor.pipeline.artifact_settings import ImageOptions
    from tersor.pipeline.evaluate import evaluate as measured

    images = ImageOptions(
        channels,
        cli_compress.numbers("--mean", mean),
        cli_compress.numbers("--std", std),
        cli_compress.read_size(image_size),
    )
    with Bars(console) as bars:
        found = measured(artifact, data, runtime, task, images, progress=bars)
    console.print(str(found), soft_wrap=True)
    if as_json:
        print_json(found)


@app.command()
def bench(
    artifacts: Annotated[list[Path], typer.Argument(help="folders of runs, or ONNX files", show_default=False)],
    seconds: Annotated[float, typer.Option(help="time limit per batch size")] = 20.0,
    as_json: Json = False,
) -> None:
    """Compare the latency of artifacts in interleaved rounds, in every installed runtime."""
    from tersor.pipeline.bench import LatencyTable, timed

    if not 0 < seconds < float("inf"):
        raise InputError(f"--seconds is {seconds}. Write a number above 0.")

    found: list[LatencyTable] = []
    for each in timed(artifacts, seconds):
        show(console, *latency_tables(each, seconds))
        found.append(each)
    if as_json:
        print_json(found)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="folder of a run or a search", show_default=False)],
) -> None:
    """Render report.html again from the measurements in the folder."""
    from tersor.checkpoint.artifact import replace_file
    from tersor.report.page import REPORT, write_report
    from tersor.search.folder import FRONT, read_front
    from tersor.search.front_page import write_front_page

    if (folder / FRONT).is_file():
        write_front_page(folder, read_front(folder))
    else:
        replace_file(folder, REPORT, write_report)
    console.print(f"written: {folder / REPORT}", soft_wrap=True)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="name of the method to describe", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or describe one: formula, paper, parameters."""
    from tersor import methods as registry
    from tersor.recipe import describe, parameters

    if as_json:
        print_json({each: describe(registry.get(each)) for each in ([name] if name else registry.names())})
        return
    if name is None:
        table = Table("method", "description")
        exempt: list[str] = []
        for each in registry.names():
            cls = registry.get(each)
            table.add_row(each, (sys.modules[cls.__module__].__doc__ or "").splitlines()[0])
            exempt += [f"{each}, test '{law}': {reason}" for law, reason in getattr(cls, "exempt", {}).items()]
        show(console, table)
        console.print(
            "Some methods are exempt from a test that all others have to pass:", *exempt, sep="\n  ", soft_wrap=True
        )
        return
    cls = registry.get(name)
    console.print((sys.modules[cls.__module__].__doc__ or "").strip(), soft_wrap=True)
    table = Table("parameter", "type", "default", "description")
    for row in parameters(cls):
        table.add_row(*row)
    show(console, table)
    example = json.dumps({name: getattr(cls, "example", {})})
    console.print(f"example: {example}", soft_wrap=True)


@app.command()
def schema(
    of: Annotated[
        Document, typer.Argument(help="recipe, results (numbers.json), or a command that has --json")
    ] = "recipe",
) -> None:
    """Print the JSON schema of a recipe (for editors), or of a document that --json prints."""
    print_json(schema_of(of))


def _explain(recipe: Recipe) -> None:
    """Describe a run without training."""
    from tersor.pipeline.dry_run import explain

    with Bars(console) as bars:
        for line in explain(recipe, progress=bars):
            console.print(line, soft_wrap=True)


def main() -> None:
    """Run the command line. A user error is one message and exit code 2."""
    sys.path.append(
        str(Path.cwd())
    )  # last, so that a `package.module:function` in the working directory shadows nothing
    try:
        with enough_memory("Close other programs, or use fewer or smaller images."):
            app()  # exit code 130 after Ctrl-C
    except InputError as error:
        # a lost process is reported by every remaining one
        _say(f"error: {error}", style="red", everyone=isinstance(error, ProcessLost))
        sys.exit(2)


def _say(message: str, style: str | None = None, *, everyone: bool = False) -> None:
    """Print to stderr, from the first process only unless `everyone`."""
    if everyone or os.environ.get("RANK", "0") == "0":
        plain_console(stderr=True).print(message, style=style, soft_wrap=True)
