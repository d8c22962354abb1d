"""The command line. Torch is imported inside the commands that need it, so that `--help` is fast."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from tersor.core.errors import InputError, ProcessLost
from tersor.core.resources import enough_memory
from tersor.progress_bars import Bars

if TYPE_CHECKING:
    from tersor.evaluation.results import Results
    from tersor.pipeline.sensitivity_analysis import BitCosts

app = typer.Typer(
    name="tersor",
    help="Compress PyTorch vision models: distill, prune, quantize, export to ONNX, and measure the result.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
console = Console()
_INTERRUPTED = 130
_SHOWN = 10

RecipeFile = Annotated[Path, typer.Argument(help="recipe file (YAML)", show_default=False)]
ChangedValues = Annotated[list[str] | None, typer.Option("--set", help="override a value: stages.0.epochs=3")]


@app.command()
def run(
    recipe: RecipeFile,
    out: Annotated[Path | None, typer.Option(help="folder to write; it must not exist [default: runs/NAME]")] = None,
    set_: ChangedValues = None,
    resume: Annotated[bool, typer.Option("--resume", help="resume an interrupted run")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="describe the run without training")] = False,
) -> None:
    """Run a recipe and write one folder: model, original, report and measurements."""
    from tersor.recipe import read

    checked = read(recipe, set_ or [])
    with Bars(console) as bars:
        if explain:
            from tersor.pipeline.dry_run import explain as lines

            for line in lines(checked, progress=bars):
                console.print(line, highlight=False, markup=False)
            return
        from tersor.core import distributed
        from tersor.core.device import keep_freed_memory
        from tersor.pipeline.run import run as walk

        out = out or Path("runs") / recipe.stem
        keep_freed_memory()
        try:
            folder = walk(checked, out=out, resume=resume, progress=bars)
        except KeyboardInterrupt:
            how = "the same command" if distributed.count() > 1 else f"tersor {shlex.join(sys.argv[1:])}"
            _say(f"interrupted. To resume: {how}{'' if resume else ' --resume'}")
            raise typer.Exit(_INTERRUPTED) from None
    if distributed.rank():
        return
    from tersor.evaluation.results import Results

    results = Results.model_validate_json((folder / "numbers.json").read_bytes())
    console.print(f"results are in {folder / 'report.html'}", highlight=False)
    console.print(_table(results))
    console.print(f"written: {folder}", highlight=False)


@app.command()
def sensitivity(
    recipe: RecipeFile,
    out: Annotated[Path | None, typer.Option(help="file to write or resume [default: NAME.sensitivity.json]")] = None,
    set_: ChangedValues = None,
    images: Annotated[int | None, typer.Option(min=1, help="number of validation images [default: all]")] = None,
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
    console.print(_most_sensitive(found))
    console.print(f"written: {out} and {figure}", highlight=False)


@app.command("eval")
def evaluate(
    artifact: Annotated[Path, typer.Argument(help="folder of a run, or ONNX file", show_default=False)],
    data: Annotated[str | None, typer.Option(help="image folder or data set [default: from the recipe]")] = None,
    runtime: Annotated[str | None, typer.Option(help="onnxruntime or openvino [default: from the recipe]")] = None,
    task: Annotated[str | None, typer.Option(help="what the network is for [default: from the recipe]")] = None,
) -> None:
    """Measure an artifact on test images in its runtime: accuracy, or the metric of its task."""
    from tersor.pipeline.evaluate import evaluate as measured

    with Bars(console) as bars:
        found = measured(artifact, data, runtime, task, progress=bars)
    console.print(str(found))


@app.command()
def bench(
    artifacts: Annotated[list[Path], typer.Argument(help="folders of runs, or ONNX files", show_default=False)],
    seconds: Annotated[float, typer.Option(help="time limit per batch size")] = 20.0,
) -> None:
    """Compare the latency of artifacts in interleaved rounds, in every installed runtime."""
    from tersor.pipeline.evaluate import timed

    if not 0 < seconds < float("inf"):
        raise InputError(f"--seconds is {seconds}. Write a number above 0.")

    for each in timed(artifacts, seconds):
        title = f"batch {each.batch_size}: {each.rounds} rounds, {_until(each.ended_by, seconds)}"
        table = Table(title=title, title_justify="left")
        table.add_column("file", overflow="fold")
        table.add_column("runtime", no_wrap=True)
        for column in ("median ms (p10 to p90)", "vs. original", "vs. baseline"):
            table.add_column(column)
        for row in each.rows:
            table.add_row(*row)
        console.print(table)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="folder of a run", show_default=False)],
) -> None:
    """Render report.html again from the measurements in the folder."""
    from tersor.checkpoint.artifact import replace_file
    from tersor.report.page import REPORT, write_report

    replace_file(folder, REPORT, write_report)
    console.print(f"written: {folder / REPORT}", highlight=False)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="a method, for details", show_default=False)] = None,
) -> None:
    """List the methods, or describe one: formula, paper, parameters."""
    from tersor import methods as registry
    from tersor.recipe import parameters

    if name is None:
        table = Table("method", "description")
        exempt: list[str] = []
        for each in registry.names():
            cls = registry.get(each)
            table.add_row(each, (sys.modules[cls.__module__].__doc__ or "").splitlines()[0])
            exempt += [f"{each} from '{law}': {reason}" for law, reason in getattr(cls, "exempt", {}).items()]
        console.print(table)
        console.print(f"{len(exempt)} exemptions from the laws that methods are tested against", *exempt, sep="\n  ")
        return
    cls = registry.get(name)
    console.print((sys.modules[cls.__module__].__doc__ or "").strip(), highlight=False, markup=False, soft_wrap=True)
    table = Table("parameter", "type", "default", "description")
    for row in parameters(cls):
        table.add_row(*row)
    console.print(table)
    example = json.dumps({name: getattr(cls, "example", {})})
    console.print(f"example: {example}", highlight=False, markup=False)


@app.command()
def schema(
    of: Annotated[Literal["recipe", "results"], typer.Argument(help="recipe, or results (numbers.json)")] = "recipe",
) -> None:
    """Print the JSON schema of a recipe (for editors), or of numbers.json."""
    from tersor.evaluation.results import Results
    from tersor.recipe import schema as recipe_schema

    found = recipe_schema() if of == "recipe" else Results.model_json_schema()
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


def _table(results: Results) -> Table:
    """The results side by side, and the artifact compared with the original and the baseline."""
    from tersor.report.summary import describe_reduction, entries
    from tersor.report.verdict import RUNTIMES, describe_speedup, reference_entry, same_runtime

    columns, artifact = entries(results), results.artifact
    title = f"{results.machine.cpu}, {results.machine.threads} threads"
    table = Table(title=title, caption=f"Parentheses: 95 % intervals. Rounds: {_ended(results)}.")
    for column in ("", *columns, "vs. original", "vs. baseline"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("runtime", *[RUNTIMES[entry.runtime] for entry in columns.values()])
    table.add_row("float precision", *[entry.precision for entry in columns.values()])
    metric = results.metric
    table.add_row(metric.title, *[f"{entry.score:.{metric.digits}f}" for entry in columns.values()])
    table.add_row("prediction agreement, %", *[f"{entry.agreement:.2f}" for entry in columns.values()])
    for label, key, unit in (
        ("MB", "bytes", 1e6),
        ("million MACs", "macs", 1e6),
        ("giga bit operations", "bit_operations", 1e9),
    ):
        less = [
            describe_reduction(getattr(reference_entry(results, name, "1"), key), getattr(artifact, key))
            for name in results.speedup
        ]
        table.add_row(label, *[f"{getattr(entry, key) / unit:.3f}" for entry in columns.values()], *less)
    for size, baseline in results.baseline.items():
        medians = [
            f"{entry.latency_ms[size].median:.2f}"
            + ("\nbaseline" if entry is not artifact and same_runtime(entry, baseline) else "")
            for entry in columns.values()
        ]
        table.add_row(f"ms, batch {size}", *medians, *[describe_speedup(of[size]) for of in results.speedup.values()])
    return table


def _ended(results: Results) -> str:
    """Why the rounds ended, by batch size."""
    from tersor.report.verdict import by_batch_size

    rounds = results.rounds
    return by_batch_size({size: _until(reason, rounds.time_limit_seconds) for size, reason in rounds.ended_by.items()})


def _until(ended_by: str, seconds: float) -> str:
    """Why the rounds of a batch size ended."""
    from tersor.evaluation.timings import NARROW

    narrow = f"until all intervals were narrower than {100 * NARROW:.0f} %"
    return narrow if ended_by == "interval" else f"until the time limit of {seconds:g} s"


def _most_sensitive(found: BitCosts) -> Table:
    """The most sensitive layers, with their error at each bit width."""
    from tersor.report.templating import number

    widths = sorted({cost.bits for cost in found.costs})
    costs = {(cost.layer, cost.bits): cost for cost in found.costs}
    worst = sorted(found.weights, key=lambda layer: -max(costs[layer, bits].error for bits in widths))[:_SHOWN]
    caption = "error of the outputs in % (lost metric in points)"
    table = Table(title=f"the {len(worst)} most sensitive of {len(found.weights)} layers", caption=caption)
    table.add_column("layer", overflow="fold")
    for bits in widths:
        table.add_column(f"{bits} bits", justify="right")
    for layer in worst:
        row = [costs[layer, bits] for bits in widths]
        table.add_row(layer, *[f"{number(100 * each.error, 2)}\n({each.drop:.1f})" for each in row])
    return table


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
        Console(stderr=True).print(message, style=style, highlight=False, markup=False, soft_wrap=True)
