"""`tersor run`. Torch is imported inside the command, so that `--help` is fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tersor.cli_output import (
    ChangedValues,
    RecipeFile,
    described_input,
    plain_console,
    results_tables,
    show,
    stop_interrupted,
    write_document,
)
from tersor.core.errors import InputError
from tersor.progress_bars import Bars
from tersor.tracking import TrackerName, tracked

if TYPE_CHECKING:
    from tersor.recipe import Recipe


def run(
    recipe: RecipeFile,
    out: Annotated[Path | None, typer.Option(help="folder to write; it must not exist [default: runs/NAME]")] = None,
    set_: ChangedValues = None,
    resume: Annotated[bool, typer.Option("--resume", help="resume an interrupted run")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="describe the run without training")] = False,
    no_latency: Annotated[
        bool, typer.Option("--no-latency", help="skip the latency measurement, which takes almost half of a short run")
    ] = False,
    track: Annotated[
        TrackerName | None, typer.Option(help="log losses and accuracy to tensorboard or mlflow", show_default=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="print a JSON document on stdout, the rest on stderr")
    ] = False,
) -> None:
    """Run a recipe and write one folder: model, original, report and measurements."""
    from tersor.recipe import read

    if explain and as_json:
        raise InputError("--explain writes text. Leave out --json or --explain.")
    console, checked = plain_console(stderr=as_json), read(recipe, set_ or [])
    if explain:
        _explain(checked, console)
        return
    out = out or Path("runs") / recipe.stem
    try:
        finished = _run(checked, out, console, track, resume=resume, latency=not no_latency)
    except KeyboardInterrupt:
        kept, again = _kept(out)
        stop_interrupted(kept, again, "" if resume else "--resume")
    if finished:
        numbers = (out / "numbers.json").read_text()
        _print(numbers, out, console)
        if as_json:
            write_document(numbers)


def _run(
    recipe: Recipe, out: Path, console: Console, track: TrackerName | None, *, resume: bool, latency: bool
) -> bool:
    """Run the recipe; whether this is the first process, which writes the folder."""
    from tersor.core import distributed
    from tersor.core.device import keep_freed_memory
    from tersor.pipeline.run import run as walk

    keep_freed_memory()
    with Bars(console) as bars, tracked(bars, track, out.parent / f"{out.name}.tracking") as progress:
        walk(recipe, out=out, resume=resume, latency=latency, progress=progress)
    return not distributed.rank()


def _kept(out: Path) -> tuple[str, str]:
    """What an interrupted run has written, and what the command that continues it does."""
    from tersor.checkpoint.artifact import MANIFEST, MODEL, checkpoints_of

    if (out / MANIFEST).is_file():
        return f"{out} is complete; its network is {out / MODEL}", "To print the results"
    if checkpoints_of(out).is_dir():
        return f"{checkpoints_of(out)} holds the progress; there is no {MODEL} yet", "To resume"
    return "There is no checkpoint yet, so nothing was saved", "To start again"


def _print(numbers: str, folder: Path, console: Console) -> None:
    """Print the results."""
    from tersor.evaluation.results import Results

    results = Results.model_validate_json(numbers)
    console.print(f"results are in {folder / 'report.html'}", soft_wrap=True)
    show(console, *results_tables(results))
    console.print(f"written: {folder}; model.onnx takes {described_input(folder / 'model.onnx')}", soft_wrap=True)


def _explain(recipe: Recipe, console: Console) -> None:
    """Describe a run without training."""
    from tersor.pipeline.dry_run import explain

    with Bars(console) as bars:
        for line in explain(recipe, progress=bars):
            console.print(line, soft_wrap=True)
