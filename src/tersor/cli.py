"""The command line. Torch is imported inside the commands that need it, so that `--help` is fast."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from tersor import cli_compress, cli_pick, cli_run
from tersor.cli_bench import latency_tables
from tersor.cli_output import (
    ChangedValues,
    Document,
    RecipeFile,
    only_json_on_stdout,
    plain_console,
    print_json,
    say,
    schema_of,
    sensitivity_table,
    show,
    stop_interrupted,
)
from tersor.core.errors import InputError, ProcessLost
from tersor.core.resources import enough_memory
from tersor.progress_bars import Bars

app = typer.Typer(
    name="tersor",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
console = plain_console()


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


Json = Annotated[
    bool,
    typer.Option("--json", callback=_tables_to_stderr, help="print a JSON document on stdout, the rest on stderr"),
]


app.command()(cli_run.run)
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
            if out.is_file():
                stop_interrupted(f"{out} holds the measurements so far")
            stop_interrupted("Nothing has been measured yet", "To start again")
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
    artifacts: Annotated[
        list[Path], typer.Argument(help="folders of runs or searches, or ONNX files", show_default=False)
    ],
    seconds: Annotated[float, typer.Option(help="time limit per batch size")] = 20.0,
    as_json: Json = False,
) -> None:
    """Compare the latency of artifacts in interleaved rounds, in every installed runtime."""
    from tersor.pipeline.bench import LatencyTable, timed

    if not 0 < seconds < float("inf"):
        raise InputError(f"--seconds is {seconds}. Write a finite number above 0.")

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
    from tersor.recipe import describe, documentation, parameters

    if as_json:
        print_json({each: describe(registry.get(each)) for each in ([name] if name else registry.names())})
        return
    if name is None:
        table = Table("method", "description")
        exempt: list[str] = []
        for each in registry.names():
            cls = registry.get(each)
            table.add_row(each, (sys.modules[cls.__module__].__doc__ or "").splitlines()[0])
            reason = getattr(cls, "exempt", {}).get("off")
            exempt += [f"{each}: {reason}"] if reason else []
        show(console, table)
        console.print(
            "Most methods can be switched off, for example with loss_weight: 0 or sparsity: 0. These cannot:",
            *exempt,
            sep="\n  ",
            soft_wrap=True,
        )
        return
    cls = registry.get(name)
    console.print(documentation(cls), soft_wrap=True)
    table = Table("parameter", "type", "default", "description")
    for row in parameters(cls):
        table.add_row(*row)
    show(console, table)
    example = json.dumps({name: getattr(cls, "example", {})})
    console.print(f"example: {example}", soft_wrap=True)


_SCHEMAS_OF = "recipe; results (the document of run --json); or the name of a command that has --json, such as eval"


@app.command()
def schema(
    of: Annotated[Document, typer.Argument(help=_SCHEMAS_OF)] = "recipe",
) -> None:
    """Print the JSON schema of a recipe (for editors), or of a document that --json prints."""
    print_json(schema_of(of))


def main() -> None:
    """Run the command line. A user error is one message and exit code 2."""
    sys.path.append(
        str(Path.cwd())
    )  # last, so that a `package.module:function` in the working directory shadows nothing
    try:
        json = only_json_on_stdout() if "--json" in sys.argv else nullcontext()
        with json, enough_memory("Close other programs, or use fewer or smaller images."):
            app()  # exit code 130 after Ctrl-C
    except InputError as error:
        # a lost process is reported by every remaining one
        say(f"error: {error}", style="red", everyone=isinstance(error, ProcessLost))
        sys.exit(2)
    except OSError as error:  # of a file that the user named, such as one without permission to read
        if error.filename is None:
            raise
        say(f"error: {error.filename}: {error.strerror}. Check the path and the permissions.", style="red")
        sys.exit(2)
