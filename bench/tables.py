"""Print rows as tables, and write rows of timings."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

import rows
from tersor.evaluation.timings import Ratio

DEFAULT_PRECISION = "fp32, default precision"
"""The original file at OpenVINO's default precision, which costs nothing."""


def versions() -> dict[str, str]:
    """Return the versions of the runtimes and quantizers."""
    return {package: version(package) for package in ("onnxruntime", "openvino", "nncf")}


def version(package: str) -> str:
    """Return the version of an installed package."""
    return importlib.metadata.version(package)


def add(
    result: str, identity: Mapping[str, Any], what: str, spread: Mapping[str, float], more: Mapping[str, Any]
) -> None:
    """Write a row of a median with its 10th and 90th percentile; the images come from seed 0."""
    tenths = {"p10": spread["p10"], "p90": spread["p90"]}
    rows.add(result, identity, {what: spread["median"], **more, "n": spread["n"], "spread": tenths}, [0])


def add_ratio(
    result: str, identity: Mapping[str, Any], ratio: Ratio, more: Mapping[str, Any], what: str = "ratio"
) -> None:
    """Write a row of a ratio with its 95 % interval; the images come from seed 0."""
    interval = {"low": ratio.low, "high": ratio.high}
    rows.add(result, identity, {what: ratio.value, **more, "n": ratio.n, "spread": interval}, [0])


def show(result: str, models: Iterable[str]) -> None:
    """Print the rows of this machine and these versions: accuracy, ratios, milliseconds."""
    here = rows.machine()
    found = [row for row in rows.read(result) if row["machine"] == here and row["versions"] == versions()]
    console = Console(width=150)
    for model in models:
        mine = [row for row in found if row["model"] == model]
        accuracies = [row for row in mine if row["kind"] == "accuracy"]
        if accuracies:
            console.print(_accuracies(model, accuracies))
        for kind, key in (("ratio", "pair"), ("milliseconds", "artifact")):
            chosen = [row for row in mine if row["kind"] == kind]
            if chosen:
                console.print(by_batch(f"{model}: {kind} ({what_spread(kind)})", chosen, kind, key))


def what_spread(kind: str) -> str:
    """Return the meaning of the brackets after a value; in older rows those of a ratio are p10 and p90 too."""
    return "95 % interval" if kind == "ratio" else "p10 to p90"


def _accuracies(model: str, found: list[rows.Row]) -> Table:
    heads = ("artifact", "runtime", "accuracy", "draws", "lost", "agreement", "bytes", "calibration s", "artifact s")
    table = Table(*heads, title=f"{model}: 10,000 test images", title_justify="left")
    for row in found:
        numbers = (f"{row['accuracy']:.2f}", " ".join(f"{value:.2f}" for value in row["accuracies"]))
        more = (f"{row['lost']:.2f}", f"{row['agreement']:.2f}", f"{row['bytes']:,}")
        seconds = (f"{row['calibration_seconds']:.1f}", f"{row['artifact_seconds']:.1f}")
        table.add_row(row["artifact"], f"{row['runtime']} ({row['precision']})", *numbers, *more, *seconds)
    return table


def by_batch(title: str, found: list[rows.Row], what: str, key: str) -> Table:
    """Return a table with a line for each contender and a column for each batch size; the fastest time is bold."""
    batches = sorted({row["batch"] for row in found})
    table = Table(key, "runtime", *(f"batch {batch}" for batch in batches), title=title, title_justify="left")
    best = {batch: min(row[what] for row in found if row["batch"] == batch) for batch in batches}
    for runtime, name in dict.fromkeys((row["runtime"], row[key]) for row in found):
        cells = {row["batch"]: row for row in found if (row["runtime"], row[key]) == (runtime, name)}
        texts = [_cell(cells.get(batch), what, best[batch]) for batch in batches]
        table.add_row(name, runtime, *texts)
    return table


def _cell(row: rows.Row | None, what: str, best: float) -> str:
    if row is None:
        return ""
    low, high = row["spread"].values()
    text = f"{row[what]:.2f} ({low:.2f} to {high:.2f}) n {row['n']}"
    return f"[bold]{text}[/bold]" if what == "milliseconds" and row[what] == best else text
