"""The latency of every round."""

from __future__ import annotations

import numpy as np

from tersor.report.charts import dots
from tersor.report.summary import colour, entries
from tersor.report.templates import Markup, number, tag
from tersor.report.verdict import Numbers


def latencies(numbers: Numbers) -> Markup:
    """All rounds as dots: one panel for each batch size, one line for each that was measured."""
    machine = numbers["machine"]
    panels = [_latency_panel(numbers, size) for size in numbers["baseline"]]
    return tag(
        "section",
        tag("h2", "Latency, round by round"),
        tag(
            "p",
            f"Each dot is one round on {machine['cpu']} with {machine['threads']} threads, {machine['system']}; the "
            "line is the median. In every round all took turns. Squares at the right edge lie beyond it.",
        ),
        *panels,
    )


def _latency_panel(numbers: Numbers, size: str) -> Markup:
    runs = {
        title: [value for group in entry["latency_runs_ms"][size] for value in group]
        for title, entry in entries(numbers).items()
    }
    longest = 1.15 * max(float(np.percentile(values, 95)) for values in runs.values())
    lines: list[Markup] = []
    for title, entry in entries(numbers).items():
        spread, kind = entry["latency_ms"][size], colour(title)
        label = (
            f"{title}, batch {size}: median {number(spread['median'])} ms, 10th to 90th percentile "
            f"{number(spread['p10'])} to {number(spread['p90'])}, {spread['n']} rounds"
        )
        lines += [
            tag("div", title, class_=f"key {kind}"),
            dots(runs[title], longest, kind, label),
            tag("div", f"{number(spread['median'])} ms", tag("small", f"n = {spread['n']}"), class_="amount"),
        ]
    axis = tag("div", tag("span", "0"), tag("span", f"{number(longest)} ms"), class_="axis")
    told = tag("figcaption", _ended(numbers, size))
    return tag("figure", tag("h3", f"Batch {size}"), tag("div", *lines, axis, class_="rows"), told)


def _ended(numbers: Numbers, size: str) -> str:
    """How many rounds there were, and why there were no more."""
    told, ratio = numbers["rounds"], numbers["speedup"]["baseline"][size]
    narrow = f"every interval was narrower than {100 * told['interval_width']:.0f} %"
    why = {
        "interval": f"They ended when {narrow}.",
        "time": f"They ended at the time limit of {told['time_limit_seconds']:g} s, before {narrow}.",
    }
    return (
        f"{ratio['n']} rounds in {ratio['groups']} groups; every group opened all files again. "
        f"{why[told['ended_by'][size]]}"
    )
