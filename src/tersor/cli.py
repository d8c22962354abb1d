"""The command line. Torch is imported by the commands that need it, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tersor.core.errors import InputError, ProcessLost
from tersor.core.resources import enough_memory
from tersor.progress_bars import Bars

if TYPE_CHECKING:
    from tersor.pipeline.sensitivity_analysis import BitCosts

app = typer.Typer(
    name="tersor",
    help="Distil, quantize and prune a trained vision network, with the evidence beside it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
console = Console()
_INTERRUPTED = 130
_SHOWN = 10

RecipeFile = Annotated[Path, typer.Argument(help="a recipe, in YAML", show_default=False)]
ChangedValues = Annotated[list[str] | None, typer.Option("--set", help="change a value: stages.0.epochs=3")]


@app.command()
def run(
    recipe: RecipeFile,
    out: Annotated[Path | None, typer.Option(help="folder to write; must not exist. runs/NAME by default")] = None,
    set_: ChangedValues = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was interrupted")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="say what would happen, and train nothing")] = False,
) -> None:
    """Walk through a recipe and write one folder: the model, its original, and the numbers."""
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
            _say(f"interrupted. To go on: {how}{'' if resume else ' --resume'}")
            raise typer.Exit(_INTERRUPTED) from None
    if distributed.rank():
        return
    numbers = json.loads((folder / "numbers.json").read_text())
    console.print(f"{folder / 'report.html'} tells what came of it", highlight=False)
    console.print(_table(numbers))
    console.print(f"written: {folder}", highlight=False)


@app.command()
def sensitivity(
    recipe: RecipeFile,
    out: Annotated[
        Path | None, typer.Option(help="file to write, and to go on with; NAME.sensitivity.json by default")
    ] = None,
    set_: ChangedValues = None,
    images: Annotated[int | None, typer.Option(min=1, help="validation images to look at; all if left")] = None,
) -> None:
    """Measure what each layer costs on each number of bits, and draw it."""
    from tersor.pipeline.sensitivity_analysis import measure
    from tersor.recipe import read

    checked = read(recipe, set_ or [])
    out = out or Path(f"{recipe.stem}.sensitivity.json")
    with Bars(console) as bars:
        try:
            found, figure = measure(checked, out=out, images=images, progress=bars)
        except KeyboardInterrupt:
            _say(f"interrupted. To go on: tersor {shlex.join(sys.argv[1:])}")
            raise typer.Exit(_INTERRUPTED) from None
    console.print(_costliest(found))
    console.print(f"written: {out} and {figure}", highlight=False)


@app.command("eval")
def evaluate(
    artifact: Annotated[Path, typer.Argument(help="the folder of a run, or an ONNX file", show_default=False)],
    data: Annotated[str | None, typer.Option(help="an image folder, or a name; of the folder's recipe if left")] = None,
    runtime: Annotated[str | None, typer.Option(help="onnxruntime or openvino; the recipe's if left")] = None,
) -> None:
    """Run an artifact over a test set, in its runtime."""
    from tersor.pipeline.evaluate import evaluate as measured

    with Bars(console) as bars:
        found = measured(artifact, data, runtime, progress=bars)
    console.print(f"{found.accuracy:.2f} % of {found.images} test images, {found.runtime} in {found.precision}")


@app.command()
def bench(
    artifacts: Annotated[list[Path], typer.Argument(help="folders of runs, or ONNX files", show_default=False)],
    seconds: Annotated[float, typer.Option(help="for each batch size")] = 20.0,
) -> None:
    """Time artifacts against each other, interleaved, in every runtime that is installed."""
    from tersor.pipeline.evaluate import timed

    if not 0 < seconds < float("inf"):
        raise InputError(f"--seconds is {seconds}. Write a number above 0.")

    for each in timed(artifacts, seconds):
        title = f"batch {each.batch_size}: {each.rounds} rounds, until {_until(each.ended_by, seconds)}"
        table = Table(title=title, title_justify="left")
        table.add_column("file", overflow="fold")
        table.add_column("runtime", no_wrap=True)
        for column in ("median ms (p10 to p90)", "against the original", "against the baseline"):
            table.add_column(column)
        for row in each.rows:
            table.add_row(*row)
        console.print(table)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="the folder of a run", show_default=False)],
) -> None:
    """Draw report.html again, from the numbers and the evidence in the folder."""
    from tersor.checkpoint.artifact import replace_file
    from tersor.report.page import REPORT, draw

    replace_file(folder, REPORT, draw)
    console.print(f"written: {folder / REPORT}", highlight=False)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="one method, in full", show_default=False)] = None,
) -> None:
    """What methods there are; of one: what it is, its paper, its parameters."""
    from tersor import methods as registry
    from tersor.recipe import parameters

    if name is None:
        table = Table("method", "what it does")
        exempt: list[str] = []
        for each in registry.names():
            cls = registry.get(each)
            table.add_row(each, (sys.modules[cls.__module__].__doc__ or "").splitlines()[0])
            exempt += [f"{each} from '{law}': {reason}" for law, reason in getattr(cls, "exempt", {}).items()]
        console.print(table)
        console.print(f"{len(exempt)} exemptions from the laws that every method passes", *exempt, sep="\n  ")
        return
    cls = registry.get(name)
    console.print((sys.modules[cls.__module__].__doc__ or "").strip(), highlight=False, markup=False, soft_wrap=True)
    table = Table("parameter", "type", "default", "meaning")
    for row in parameters(cls):
        table.add_row(*row)
    console.print(table)
    example = json.dumps({name: getattr(cls, "example", {})})
    console.print(f"for instance: {example}", highlight=False, markup=False)


@app.command()
def schema() -> None:
    """The JSON schema of a recipe, for editors."""
    from tersor.recipe import schema as of_recipes

    sys.stdout.write(json.dumps(of_recipes(), indent=1) + "\n")


def _table(numbers: dict[str, Any]) -> Table:
    """All entries side by side, and the artifact against the original and the baseline."""
    from tersor.report.summary import entries, less_by
    from tersor.report.verdict import RUNTIMES, difference, reference, same_place

    columns, artifact = entries(numbers), numbers["artifact"]
    title = f"{numbers['machine']['cpu']}, {numbers['machine']['threads']} threads"
    table = Table(title=title, caption=f"In brackets: 95 % intervals. Rounds: {_ended(numbers)}.")
    for column in ("", *columns, "against the original", "against the baseline"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("runtime", *[RUNTIMES[entry["runtime"]] for entry in columns.values()])
    table.add_row("floats in", *[entry["precision"] for entry in columns.values()])
    table.add_row("accuracy, %", *[f"{entry['accuracy']:.2f}" for entry in columns.values()])
    table.add_row("answers kept, %", *[f"{entry['agreement']:.2f}" for entry in columns.values()])
    for label, key, unit in (
        ("MB", "bytes", 1e6),
        ("million MACs", "macs", 1e6),
        ("giga bit operations", "bit_operations", 1e9),
    ):
        less = [less_by(reference(numbers, name, "1")[key], artifact[key]) for name in numbers["speedup"]]
        table.add_row(label, *[f"{entry[key] / unit:.3f}" for entry in columns.values()], *less)
    for size, baseline in numbers["baseline"].items():
        medians = [
            f"{entry['latency_ms'][size]['median']:.2f}"
            + ("\nbaseline" if entry is not artifact and same_place(entry, baseline) else "")
            for entry in columns.values()
        ]
        table.add_row(f"ms, batch {size}", *medians, *[difference(of[size]) for of in numbers["speedup"].values()])
    return table


def _ended(numbers: dict[str, Any]) -> str:
    """Why there were no more rounds, by batch size."""
    from tersor.report.verdict import by_batch_size

    told = numbers["rounds"]
    return by_batch_size(
        {size: f"until {_until(reason, told['time_limit_seconds'])}" for size, reason in told["ended_by"].items()}
    )


def _until(ended_by: str, seconds: float) -> str:
    """What ended the rounds of a batch size."""
    from tersor.evaluation.timings import NARROW

    narrow = f"all intervals were narrower than {100 * NARROW:.0f} %"
    return narrow if ended_by == "interval" else f"the time limit of {seconds:g} s"


def _costliest(found: BitCosts) -> Table:
    """The layers whose error is largest, and what they cost on each width."""
    from tersor.report.templates import number

    widths = sorted({cost.bits for cost in found.costs})
    costs = {(cost.layer, cost.bits): cost for cost in found.costs}
    worst = sorted(found.weights, key=lambda layer: -max(costs[layer, bits].error for bits in widths))[:_SHOWN]
    caption = "error of the logits, % (points of accuracy lost)"
    table = Table(title=f"{len(worst)} costliest of {len(found.weights)} layers", caption=caption)
    table.add_column("layer", overflow="fold")
    for bits in widths:
        table.add_column(f"{bits} bits", justify="right")
    for layer in worst:
        row = [costs[layer, bits] for bits in widths]
        table.add_row(layer, *[f"{number(100 * each.error, 2)}\n({each.drop:.1f})" for each in row])
    return table


def main() -> None:
    """Runs the command line; what a user did wrong is one message and exit code 2."""
    sys.path.append(str(Path.cwd()))  # last: `package.module:function` of the user's own folder shadows nothing
    try:
        with enough_memory("Close other programs, or use fewer or smaller images."):
            app()  # which ends with 130 where Ctrl-C was pressed
    except InputError as error:
        # that another process has died only those that are left can say
        _say(f"error: {error}", style="red", everyone=isinstance(error, ProcessLost))
        sys.exit(2)


def _say(message: str, style: str | None = None, *, everyone: bool = False) -> None:
    """On the error stream; of several processes, the first alone, or all of them."""
    if everyone or os.environ.get("RANK", "0") == "0":
        Console(stderr=True).print(message, style=style, highlight=False, markup=False, soft_wrap=True)
