"""Values of the report's first sections: references, results, stages, latencies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from tersor.evaluation.multiply_peak import share_of_peak
from tersor.evaluation.results import FileResults, Peak, Reference, Results
from tersor.report.templating import number
from tersor.report.verdict import RUNTIMES, by_batch_size, describe_speedup, runtime_of, same_runtime

AGREEMENT = 99.0
"""Lowest acceptable agreement of the file's predictions with torch's, in percent."""


def references(numbers: Results) -> list[Reference]:
    """What the artifact can be compared with: also the baseline, unless it is the original at every batch size."""
    same = all(same_runtime(baseline, numbers.original) for baseline in numbers.baseline.values())
    return ["original"] if same else ["original", "baseline"]


def describe_baseline(numbers: Results) -> str:
    """The runtimes that were tried, and the fastest of them at each batch size."""
    tried = " and ".join(RUNTIMES[runtime] for runtime in numbers.candidates)
    best = f"{tried} at its" if len(numbers.candidates) == 1 else f"the fastest of {tried} at their"
    fastest = by_batch_size({size: runtime_of(entry) for size, entry in numbers.baseline.items()})
    return f"original.onnx in {best} default precision: {fastest}"


def entries(numbers: Results) -> dict[str, FileResults]:
    """What was measured, by title: the original, the original in other runtimes and precisions, the artifact."""
    others = {
        RUNTIMES[runtime]: entry
        for runtime, entry in numbers.candidates.items()
        if not same_runtime(entry, numbers.original)
    }
    return {"original": numbers.original, **others, "artifact": numbers.artifact}


def scores(numbers: Results) -> list[str]:
    """The score of each entry, with its standard error: "90.00 ± 0.95"."""
    digits = numbers.metric.digits
    return [
        f"{entry.score:.{digits}f}" + ("" if entry.score_error is None else f" ± {entry.score_error:.{digits}f}")
        for entry in entries(numbers).values()
    ]


def colours(numbers: Results) -> dict[str, str]:
    """The CSS class of each entry."""
    return {title: title if title in {"original", "artifact"} else "baseline" for title in entries(numbers)}


def describe_reduction(before: float, after: float) -> str:
    """ "3.82x lower"; empty if either is zero."""
    if not before or not after:
        return ""
    ratio = before / after
    if 0.995 < ratio < 1.005:
        return "unchanged"
    return f"{ratio:.2f}x lower" if ratio > 1 else f"{1 / ratio:.2f}x higher"


def stages(numbers: Results) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The original and each stage, with the last known values before it."""
    before: dict[str, Any] = {}
    for record in (numbers.original, *numbers.stages):
        stage = {"name": "original"} | {key: value for key, value in record if value is not None}
        yield stage, before
        before = before | stage


def stage_values(numbers: Results) -> Iterator[str]:
    """A line for each trained stage: its losses, and the metrics of its methods that are a number or text."""
    for record in numbers.stages:
        losses = [f"{name} {number(loss)}" for name, loss in record.losses.items()]
        single = {name: value for name, value in record.metrics.items() if isinstance(value, int | float | str)}
        metrics = [f"{name} {value if isinstance(value, str) else number(value)}" for name, value in single.items()]
        parts = [f"losses, mean of the last epoch: {', '.join(losses)}"] if losses else []
        parts += [f"metrics of its methods: {', '.join(metrics)}"] if metrics else []
        if parts:
            yield f"{record.name}: {'; '.join(parts)}"


def slower_by_quantization(numbers: Results) -> Iterator[str]:
    """A line for each stage whose quantization made the file slower, with the ratios whose intervals exclude 1."""
    for record in numbers.stages:
        ratios = (record.speedup_of_quantization or {}).items()
        slower = [f"{describe_speedup(ratio)} at batch {size}" for size, ratio in ratios if ratio.high < 1]
        if slower:
            yield f"stage {record.name}: the quantized file is {' and '.join(slower)} than the file before this stage"


def disagreement(numbers: Results) -> str:
    """What to know if predictions of the artifact differ from those of the network in torch; else empty."""
    agreement = numbers.agreement_with_torch
    if agreement is None or agreement >= AGREEMENT:
        return ""
    return f"only {agreement:.2f} % of the predictions of model.onnx agree with those of the network in torch"


def describe_methods(methods: Sequence[Any]) -> str:
    """Methods as a recipe writes them: names, or names with their parameters."""
    every: list[tuple[Any, Any]] = []
    for each in methods:
        every += each.items() if isinstance(each, Mapping) else [(each, None)]
    return ", ".join(
        f"{name} ({', '.join(f'{key} {value}' for key, value in parameters.items())})" if parameters else str(name)
        for name, parameters in every
    )


def latency_runs(numbers: Results, size: str) -> tuple[dict[str, list[float]], float]:
    """Milliseconds of each entry, and the end of their axis: 15 % beyond the largest 95th percentile."""
    runs = {title: list(chain(*entry.latency_runs_ms[size])) for title, entry in entries(numbers).items()}
    return runs, 1.15 * max(float(np.percentile(run, 95)) for run in runs.values())


def peak_shares(numbers: Results) -> dict[str, dict[str, tuple[float, float | None]]]:
    """By title of an entry and batch size: billion MACs per second, and their share of the peak throughput."""
    shares: dict[str, dict[str, tuple[float, float | None]]] = {}
    for title, entry in entries(numbers).items():
        shares[title] = {}
        for size, latency in entry.latency_ms.items():
            macs = int(size) * entry.macs
            share = share_of_peak(
                entry.runtime,
                entry.float_precision,
                macs,
                latency.median,
                numbers.peaks,
                entry.integer_macs_share or 0.0,
            )
            shares[title][size] = macs / latency.median / 1e6, share
    return shares


def above_peak(shares: Mapping[str, Mapping[str, tuple[float, float | None]]]) -> bool:
    """Whether a share of `peak_shares` is above 100 %."""
    return any((share or 0) > 1 for sizes in shares.values() for _, share in sizes.values())


def peak_noise(peaks: Sequence[Peak]) -> float:
    """The median run over the fastest run, of the peak where the two differ most."""
    return min(peak.median / peak.macs_per_second for peak in peaks)
