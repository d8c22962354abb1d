"""Values of the report's first sections: references, the table of results, the table of stages, latencies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tersor.report.templating import fixed, number, signed
from tersor.report.verdict import (
    RUNTIMES,
    Numbers,
    Reference,
    by_batch_size,
    describe_speedup,
    reference_entry,
    runtime_of,
    same_runtime,
)


def references(numbers: Numbers) -> list[Reference]:
    """What the artifact can be compared with: also the baseline, unless it is the original at every batch size."""
    same = all(same_runtime(baseline, numbers["original"]) for baseline in numbers["baseline"].values())
    return ["original"] if same else ["original", "baseline"]


def describe_baseline(numbers: Numbers) -> str:
    """The runtimes that were tried, and the fastest of them at each batch size."""
    tried = " and ".join(RUNTIMES[runtime] for runtime in numbers["candidates"])
    their = "its" if len(numbers["candidates"]) == 1 else "their"
    fastest = by_batch_size({size: runtime_of(entry) for size, entry in numbers["baseline"].items()})
    return f"original.onnx in the fastest runtime of {tried} at {their} default precision: {fastest}"


def entries(numbers: Numbers) -> dict[str, Mapping[str, Any]]:
    """What was measured, by title: the original, the original in other runtimes and precisions, the artifact."""
    others = {
        RUNTIMES[runtime]: entry
        for runtime, entry in numbers["candidates"].items()
        if not same_runtime(entry, numbers["original"])
    }
    return {"original": numbers["original"], **others, "artifact": numbers["artifact"]}


def colours(numbers: Numbers) -> dict[str, str]:
    """The CSS class of each entry."""
    return {title: title if title in {"original", "artifact"} else "baseline" for title in entries(numbers)}


@dataclass(frozen=True)
class ResultRow:
    """A row of the table of results.

    Attributes:
        title: the quantity and its unit.
        cells: one value for each entry.
        changes: reference -> the artifact against it; empty where there is no change to show.
        baseline: index of the entry that is marked as the baseline.
    """

    title: str
    cells: Sequence[str]
    changes: Mapping[Reference, str] = field(default_factory=dict[Reference, str])
    baseline: int | None = None


def results(numbers: Numbers) -> list[ResultRow]:
    """Every measurement of every entry; the latency in one row for each batch size."""
    measured, artifact = list(entries(numbers).values()), numbers["artifact"]

    def row(
        title: str, show: Callable[[Numbers], str], compare: Callable[[Numbers], str] | None = None
    ) -> ResultRow:
        compared = {name: reference_entry(numbers, name, "1") for name in references(numbers)}
        changes = {name: compare(entry) for name, entry in compared.items()} if compare else {}
        return ResultRow(title, [show(entry) for entry in measured], changes)

    def amount(title: str, key: str, unit: float) -> ResultRow:
        return row(title, lambda of: number(of[key] / unit), lambda of: describe_reduction(of[key], artifact[key]))

    return [
        row("file", lambda of: "model.onnx" if of is artifact else "original.onnx"),
        row("runtime", lambda of: RUNTIMES[of["runtime"]]),
        row("float precision", lambda of: of["precision"]),
        row(
            "accuracy, %",
            lambda of: fixed(of["accuracy"], 2),
            lambda of: signed(artifact["accuracy"] - of["accuracy"], " points"),
        ),
        row("prediction agreement, %", lambda of: fixed(of["agreement"], 2)),
        amount("file size, MB", "bytes", 1e6),
        amount("deflated file size, MB", "compressed_bytes", 1e6),
        *[_latency_row(numbers, size) for size in numbers["baseline"]],
        amount("MACs, million", "macs", 1e6),
        amount("bit operations, billion", "bit_operations", 1e9),
        row("weight sparsity, %", lambda of: fixed(100 * of["sparsity"], 1)),
        *([row("masked weights, %", lambda of: fixed(100 * of["masked"], 1))] if artifact["masked"] else []),
        amount("peak memory, MB", "peak_memory_bytes", 1e6),
        amount("load time, ms", "load_ms", 1),
    ]


def _latency_row(numbers: Numbers, size: str) -> ResultRow:
    measured = list(entries(numbers).values())
    baseline = [same_runtime(entry, numbers["baseline"][size]) for entry in measured[:-1]]
    return ResultRow(
        f"latency at batch {size}, ms",
        [number(entry["latency_ms"][size]["median"]) for entry in measured],
        {name: describe_speedup(numbers["speedup"][name][size]) for name in references(numbers)},
        baseline.index(True) if True in baseline else None,
    )


def describe_reduction(before: float, after: float) -> str:
    """ "3.82x lower"; empty if either is zero."""
    if not before or not after:
        return ""
    ratio = before / after
    if 0.995 < ratio < 1.005:
        return "unchanged"
    return f"{ratio:.2f}x lower" if ratio > 1 else f"{1 / ratio:.2f}x higher"


@dataclass(frozen=True)
class StageRow:
    """A row of the table of stages; `cells` are values with their change, which is empty where it is unknown."""

    name: str
    methods: str
    cells: Sequence[tuple[str, str]]
    cost: str
    validation: str


def stage_rows(numbers: Numbers) -> list[StageRow]:
    """The original and each stage, with the change against the row above; no rows if there were no stages."""
    before: Mapping[str, Any] = numbers["original"]
    rows = [StageRow("original", "", _stage_cells(before, {}), "", "–")]
    for stage in numbers.get("stages") or []:
        methods = ", ".join(map(_method, stage["methods"])) or "labels only" if "methods" in stage else "–"
        cost = f"{stage['steps']:,} steps, {number(stage['minutes'], 2)} min"
        validation = fixed(stage.get("validation_accuracy"), 2)
        rows.append(StageRow(stage["name"], methods, _stage_cells(stage, before), cost, validation))
        before = {**before, **{key: value for key, value in stage.items() if value is not None}}
    return rows[1:] and rows


def _stage_cells(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[tuple[str, str]]:
    def cell(key: str, unit: float, change_unit: str, digits: int) -> tuple[str, str]:
        value, previous = (None if of.get(key) is None else of[key] / unit for of in (now, before))
        change = "" if value is None or previous is None else signed(value - previous, change_unit, digits)
        return fixed(value, digits), change

    latency = now["latency_ms"]["1"]["median"] if "latency_ms" in now else None
    speedup = describe_speedup(now["speedup"]["1"]) if latency is not None and "speedup" in now else ""
    return [
        cell("accuracy", 1, " points", 2),
        cell("bytes", 1e6, "", 3),
        (fixed(latency, 3), speedup),
        cell("macs", 1e6, "", 2),
        cell("sparsity", 0.01, "", 1),
    ]


def _method(entry: Any) -> str:
    """A method as a recipe writes it: a name, or a name with its parameters."""
    if not isinstance(entry, Mapping):
        return str(entry)
    return ", ".join(
        f"{name} ({', '.join(f'{key} {value}' for key, value in parameters.items())})" if parameters else str(name)
        for name, parameters in entry.items()
    )


@dataclass(frozen=True)
class LatencyPanel:
    """The measurements at one batch size: title -> milliseconds, and the end of their common axis."""

    size: str
    runs: Mapping[str, Sequence[float]]
    end: float


def latency_panels(numbers: Numbers) -> list[LatencyPanel]:
    """One for each batch size; axes end 15 % after the largest 95th percentile."""
    panels: list[LatencyPanel] = []
    for size in numbers["baseline"]:
        runs = {
            title: [value for group in entry["latency_runs_ms"][size] for value in group]
            for title, entry in entries(numbers).items()
        }
        panels.append(LatencyPanel(size, runs, 1.15 * max(float(np.percentile(run, 95)) for run in runs.values())))
    return panels
