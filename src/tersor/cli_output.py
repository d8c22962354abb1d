"""What the commands print: tables for people, JSON documents for programs, and the schemas of these documents."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TextIO

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from tersor.evaluation.results import Reference, Results, Speedup
    from tersor.evaluation.timings import Ratio
    from tersor.pipeline.sensitivity_analysis import BitCosts
    from tersor.quantization.sensitivity import Cost

Document = Literal["recipe", "results", "eval", "bench", "pick", "sensitivity", "methods"]
RecipeFile = Annotated[Path, typer.Argument(help="recipe file (YAML)", show_default=False)]
ChangedValues = Annotated[list[str] | None, typer.Option("--set", help="override a value: stages.0.epochs=3")]
_stdout: ContextVar[TextIO | None] = ContextVar("stdout", default=None)
_INTERRUPTED = 130
_SHOWN = 10
_SPARSE = 0.001
"""Share of zero weights from which it is shown."""
_COSTS = (("MB", "bytes", 1e6), ("million MACs", "macs", 1e6), ("billion bit operations", "bit_operations", 1e9))


def schema_of(document: Document) -> dict[str, Any]:
    """The JSON schema of a recipe, or of what a command prints with `--json`."""
    return _SCHEMAS[document]()


def _recipe() -> dict[str, Any]:
    from tersor.recipe import schema

    return schema()


def _results() -> dict[str, Any]:
    from tersor.evaluation.results import Results

    return Results.model_json_schema()


def _eval() -> dict[str, Any]:
    from pydantic import TypeAdapter

    from tersor.pipeline.evaluate import Evaluation

    return TypeAdapter(Evaluation).json_schema()


def _bench() -> dict[str, Any]:
    from pydantic import TypeAdapter

    from tersor.pipeline.bench import LatencyTable

    return TypeAdapter(list[LatencyTable]).json_schema()


def _pick() -> dict[str, Any]:
    from pydantic import TypeAdapter

    from tersor.search.result import PickedPoint

    return TypeAdapter(PickedPoint).json_schema()


def _sensitivity() -> dict[str, Any]:
    from tersor.pipeline.sensitivity_analysis import BitCosts

    return BitCosts.model_json_schema()


def _methods() -> dict[str, Any]:
    from pydantic import TypeAdapter

    from tersor.recipe import MethodDescription

    return TypeAdapter(dict[str, MethodDescription]).json_schema()


_SCHEMAS: dict[Document, Callable[[], dict[str, Any]]] = {
    "recipe": _recipe,
    "results": _results,
    "eval": _eval,
    "bench": _bench,
    "pick": _pick,
    "sensitivity": _sensitivity,
    "methods": _methods,
}


def plain_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: `[0.5]` is not parsed as markup, nor `:M` as an emoji."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def say(message: str, style: str | None = None, *, everyone: bool = False) -> None:
    """Print to stderr, from the first process only unless `everyone`."""
    if everyone or os.environ.get("RANK", "0") == "0":
        plain_console(stderr=True).print(message, style=style, soft_wrap=True)


def stop_interrupted(kept: str, again: str = "To resume", option: str = "") -> NoReturn:
    """End the command after Ctrl-C with one line: what is kept, and the command that continues.

    Args:
        kept: what is kept, without a full stop.
        again: what the command does.
        option: what to add to the arguments of this command.

    Raises:
        typer.Exit: always.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    command = f"tersor {shlex.join(sys.argv[1:])}" if alone else "the same command"
    say(f"interrupted. {kept}. {again}: {command} {option}".rstrip())
    raise typer.Exit(_INTERRUPTED) from None


def show(console: Console, *tables: Table) -> None:
    """Print tables in full: text that is too wide for a column is folded, never cut."""
    for table in tables:
        for column in table.columns:
            column.overflow = "fold"
        console.print(table)


def print_json(value: Any) -> None:
    """Print a record, or a list or mapping of records, as one JSON document on stdout."""
    from pydantic_core import to_json

    write_document(to_json(value, indent=1).decode() + "\n")


def write_document(text: str) -> None:
    """Write a JSON document to stdout."""
    (_stdout.get() or sys.stdout).write(text)


@contextmanager
def only_json_on_stdout() -> Generator[None]:
    """Context in which only JSON documents go to stdout; what a user's network or data set prints goes to stderr."""
    token = _stdout.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout.reset(token)


def described_input(file: Path) -> str:
    """ "float32 images of 3 x 32 x 32": what an ONNX file takes."""
    import onnx  # slow to import

    kinds = [each.type.tensor_type for each in onnx.load(str(file), load_external_data=False).graph.input]
    texts = [
        f"{onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name} images of "
        + " x ".join(str(side.dim_value or "any") for side in kind.shape.dim[1:])
        for kind in kinds
    ]
    return " and ".join(texts)


def results_tables(results: Results) -> Iterator[Table]:
    """What was measured for each file; then the artifact compared with the original and the baseline."""
    from tersor.report.summary import entries, scores
    from tersor.report.verdict import RUNTIMES, same_runtime, scores_note

    columns, artifact = entries(results), results.artifact
    threads = results.machine.threads
    title = f"{results.machine.cpu}, {threads} thread{'s' if threads != 1 else ''}"
    table = Table(title=title, caption=scores_note(results) or None)
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("runtime", *[RUNTIMES[entry.runtime] for entry in columns.values()])
    table.add_row("precision", *[entry.precision for entry in columns.values()])
    metric = results.metric
    table.add_row(metric.title, *scores(results))
    table.add_row("prediction agreement, %", *[f"{entry.agreement:.2f}" for entry in columns.values()])
    if any(entry.sparsity >= _SPARSE for entry in columns.values()):
        zeros = [f"{100 * entry.sparsity:.1f}" for entry in columns.values()]
        table.add_row("zero weights, %", *zeros)
    for label, key, unit in _COSTS:
        table.add_row(label, *[f"{getattr(entry, key) / unit:.3f}" for entry in columns.values()])
    for size, baseline in results.baseline.items():
        medians = [
            f"{entry.latency_ms[size].median:.2f}"
            + ("\nbaseline" if entry is not artifact and same_runtime(entry, baseline) else "")
            for entry in columns.values()
        ]
        table.add_row(f"ms, batch {size}", *medians)
    yield table
    yield _comparison(results)


def _comparison(results: Results) -> Table:
    """The artifact compared with the original and the baseline; without latencies, there is no baseline."""
    from tersor.report.summary import describe_reduction
    from tersor.report.verdict import reference_entry

    names: list[Reference] = list(results.speedup) or ["original"]
    title = f"artifact, compared with the {' and the '.join(names)}"
    table = Table(title=title, caption=_latency_caption(results))
    for column in ("", *(f"vs. {name}" for name in names)):
        table.add_column(column, justify="right" if column else "left")
    for label, key, _ in _COSTS:
        before = [getattr(reference_entry(results, name, "1"), key) for name in names]
        table.add_row(label, *[describe_reduction(each, getattr(results.artifact, key)) for each in before])
    for size in results.baseline:
        table.add_row(f"ms, batch {size}", *[speedup_cell(of[size]) for of in results.speedup.values()])
    return table


def _latency_caption(results: Results) -> str:
    """Why the rounds ended, by batch size."""
    from tersor.report.verdict import by_batch_size, medians_note

    rounds = results.rounds
    if rounds is None:
        return "Latency was not measured, so no speedup is shown. To measure it, run tersor bench on this folder."
    ended = by_batch_size({size: until(reason, rounds.time_limit_seconds) for size, reason in rounds.ended_by.items()})
    return f"95 % intervals are in parentheses. Rounds ran {ended}. {medians_note(results)}".rstrip()


def until(ended_by: str, seconds: float) -> str:
    """Why the rounds of a batch size ended."""
    from tersor.evaluation.timings import NARROW

    narrow = f"until all intervals were narrower than {100 * NARROW:.0f} %"
    return narrow if ended_by == "interval" else f"until the time limit of {seconds:g} s"


def speedup_cell(ratio: Ratio | Speedup) -> str:
    """A speedup over its interval."""
    from tersor.report.verdict import describe_speedup

    return describe_speedup(ratio).replace(" (", "\n(")


_SENSITIVITY_CAPTION = (
    "Each cell shows the error of the outputs in %. With labels, it also shows in parentheses how much worse the "
    "metric is than in float (in points, for a metric in percent). The layers are sorted by their largest difference "
    "in the metric, then by their largest error. # is the position of the layer in the network. (0.0) is a difference "
    "below 0.05, which is common at 8 bits."
)
_ENDS_CAPTION = (
    " * The first and last layer: ptq keeps them at 8 bits, so only their 8-bit column applies, unless first_last_bits "
    "is set."
)


def sensitivity_table(found: BitCosts) -> Table:
    """The most sensitive layers, with their error and drop at each bit width."""
    from tersor.report.templating import number

    widths = sorted({cost.bits for cost in found.costs})
    costs = {(cost.layer, cost.bits): cost for cost in found.costs}
    order = {layer: place for place, layer in enumerate(found.weights, 1)}

    def largest(layer: str) -> tuple[float, float]:
        row = [costs[layer, bits] for bits in widths]
        return max(each.drop or 0.0 for each in row), max(each.error for each in row)

    worst = sorted(found.weights, key=largest, reverse=True)[:_SHOWN]
    kept = bool({*found.first_and_last} & {*worst})
    caption = _SENSITIVITY_CAPTION + (_ENDS_CAPTION if kept else "")
    table = Table(title=f"the {len(worst)} most sensitive of {len(found.weights)} layers", caption=caption)
    table.add_column("#", justify="right")
    table.add_column("layer")
    for bits in widths:
        table.add_column(f"{bits} bits", justify="right")
    for layer in worst:
        cells = [f"{number(100 * each.error, 2)}{_drop(each)}" for each in (costs[layer, bits] for bits in widths)]
        table.add_row(str(order[layer]), f"{layer} *" if layer in found.first_and_last else layer, *cells)
    return table


def _drop(cost: Cost) -> str:
    """The drop in the metric below the error; empty for images without labels."""
    return "" if cost.drop is None else f"\n({cost.drop:z.1f})"
