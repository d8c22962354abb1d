"""What was measured from outside: the head of the page, the figures, the stages, the latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tersor.export.report.charts import dots
from tersor.export.report.markup import Markup, number, signed, table, tag
from tersor.export.report.verdict import (
    RUNTIMES,
    Baseline,
    entry_name,
    ratio_beyond_noise,
    speedup,
    verdict,
)

Numbers = Mapping[str, Any]

_NAMES = ("original", "bf16", "artifact")

_STAGE_HEAD = (
    *("stage", "methods", "accuracy, %", "MB", "ms, batch 1", "million mult.", "zeros, %"),
    *("cost", "validation, %"),
)


def baselines(numbers: Numbers) -> list[Baseline]:
    """What the artifact can be compared with."""
    return ["original", "bf16"] if numbers["bf16"] else ["original"]


def entries(numbers: Numbers) -> list[str]:
    """What was measured."""
    return [name for name in _NAMES if numbers[name]]


def against(baseline: Baseline, *children: str, name: str = "div") -> Markup:
    """Shown only while that baseline is picked."""
    return tag(name, *children, class_=f"against-{baseline}")


def head(numbers: Numbers, evidence: Mapping[str, Any] | None) -> Markup:
    """The verdict, what it was measured on, and the picker of the baseline."""
    machine = numbers["machine"]
    lines = [against(each, _capital(verdict(numbers, each, evidence)), name="h1") for each in baselines(numbers)]
    where = (
        f"{machine['cpu']}, {machine['threads']} threads, {RUNTIMES[numbers['runtime']]} "
        f"{machine['versions'].get(numbers['runtime'])}. {numbers['test_images']:,} test images, seed "
        f"{numbers['seed']}, {numbers['date'][:10]}."
    )
    return tag("header", *lines, tag("p", where, class_="where"), _picker(numbers))


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _picker(numbers: Numbers) -> Markup:
    if len(baselines(numbers)) == 1:
        return tag("p", "Compared with the original in float32. OpenVINO is not installed, so its bf16 is not beside.")
    options = [
        tag(
            "label",
            tag("input", type="radio", name="baseline", id=f"pick-{each}", checked="" if each == "original" else None),
            tag("span", "the original in float32" if each == "original" else entry_name(numbers, each)),
        )
        for each in baselines(numbers)
    ]
    return tag("fieldset", tag("legend", "Compare with"), *options, class_="picker")


def figures(numbers: Numbers) -> Markup:
    """Everything measured, side by side; in the last column the artifact against the baseline."""
    names, artifact = entries(numbers), numbers["artifact"]

    def row(what: str, shown: Callable[[Numbers], str], change: Callable[[Baseline], str] | None = None) -> list[str]:
        changes = [against(each, change(each), name="span") for each in baselines(numbers)] if change else []
        return [what, *[shown(numbers[name]) for name in names], tag("td", *changes)]

    def less(what: str, key: str, unit: float) -> list[str]:
        return row(what, lambda of: number(of[key] / unit), lambda each: _less(numbers[each][key], artifact[key]))

    rows = [
        row("file", lambda of: "model.onnx" if of is artifact else "original.onnx"),
        row("runtime", lambda of: RUNTIMES[of["runtime"]]),
        row("floats in", lambda of: of["precision"]),
        row(
            "accuracy, %",
            lambda of: f"{of['accuracy']:.2f}",
            lambda each: signed(artifact["accuracy"] - numbers[each]["accuracy"], " points"),
        ),
        row("answers kept, %", lambda of: f"{of['agreement']:.2f}"),
        less("MB", "bytes", 1e6),
        less("MB, deflated", "compressed_bytes", 1e6),
        *[_latency_row(numbers, row, size) for size in numbers["noise_floor"]],
        less("million multiplications", "macs", 1e6),
        less("giga bit operations", "bit_operations", 1e9),
        row("zeros in the weights, %", lambda of: f"{100 * of['sparsity']:.1f}"),
        *([row("of these under masks, %", lambda of: f"{100 * of['masked']:.1f}")] if artifact["masked"] else []),
        less("MB of memory", "peak_memory_bytes", 1e6),
        less("ms to load", "load_ms", 1),
    ]
    heads = [tag("th", title(numbers, name), scope="col", class_=f"key {name}") for name in names]
    every = table(["", *heads, "change"], rows, caption="Every figure")
    return tag("section", tag("h2", "In figures"), every, *_masked(artifact))


def _masked(artifact: Numbers) -> list[Markup]:
    """What masked weights do not give, said where there are any."""
    if not artifact["masked"]:
        return []
    return [
        tag(
            "p",
            f"{100 * artifact['masked']:.1f} % of the prunable weights are masked, not removed: dense runtimes are not "
            "faster for them, since they multiply zeros like any number. What masks save is room, once the file is "
            f"deflated: {number(artifact['bytes'] / 1e6)} MB become {number(artifact['compressed_bytes'] / 1e6)}.",
            class_="note",
        )
    ]


def title(numbers: Numbers, name: str) -> str:
    """What an entry is called beside the others; "bf16" only where the processor has it."""
    return "OpenVINO" if name == "bf16" and numbers["bf16"]["precision"] != "bfloat16" else name


def _latency_row(numbers: Numbers, row: Callable[..., list[str]], size: str) -> list[str]:
    return row(
        f"ms, batch {size}",
        lambda of: number(of["latency_ms"][size]["median"]),
        lambda each: _faster(numbers, each, size),
    )


def _faster(numbers: Numbers, baseline: Baseline, size: str) -> str:
    ratio = ratio_beyond_noise(numbers, baseline, "artifact", size)
    if ratio is None:
        return f"within the noise ({speedup(numbers, baseline, 'artifact', size):.2f}x)"
    return f"{ratio:.2f}x faster" if ratio > 1 else f"{1 / ratio:.2f}x slower"


def _less(before: float, after: float) -> str:
    if not before or not after:
        return ""
    ratio = before / after
    if 0.995 < ratio < 1.005:
        return "the same"
    return f"{ratio:.2f}x less" if ratio > 1 else f"{1 / ratio:.2f}x more"


def stages(numbers: Numbers) -> Markup:
    """What each stage gave and cost, against the row above."""
    told = numbers.get("stages") or []
    if not told:
        return Markup("")
    before: Mapping[str, Any] = numbers["original"]
    rows = [["original", "", *_state(before, {}), "", "–"]]
    for stage in told:
        methods = ", ".join(map(_method, stage["methods"])) or "labels alone" if "methods" in stage else "–"
        validated = stage.get("validation_accuracy")
        rows.append(
            [
                stage["name"],
                methods,
                *_state(stage, before),
                f"{stage['steps']:,} steps, {number(stage['minutes'], 2)} min",
                "–" if validated is None else f"{validated:.2f}",
            ]
        )
        before = {**before, **{key: value for key, value in stage.items() if value is not None}}
    minutes = sum(stage["minutes"] for stage in told)
    return tag(
        "section",
        tag("h2", "What each stage gave and cost"),
        tag(
            "p",
            f"{number(minutes, 2)} minutes in all. Under each figure, the change against the row above; all on the "
            "test set and in the runtime, but for the last column.",
        ),
        table(
            _STAGE_HEAD,
            rows,
            caption="Stages",
        ),
    )


def _state(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[Markup]:
    """Accuracy, MB, ms, multiplications and sparsity, each with its change where both are known."""
    measures: list[tuple[Callable[[Mapping[str, Any]], float | None], str, int]] = [
        (lambda of: of.get("accuracy"), " points", 2),
        (lambda of: _scaled(of.get("bytes"), 1e6), "", 3),
        (lambda of: ((of.get("latency_ms") or {}).get("1") or {}).get("median"), "", 3),
        (lambda of: _scaled(of.get("macs"), 1e6), "", 2),
        (lambda of: _scaled(of.get("sparsity"), 0.01), "", 1),
    ]
    cells: list[Markup] = []
    for read, unit, digits in measures:
        value, was = read(now), read(before)
        change = "" if value is None or was is None else signed(value - was, unit, digits)
        cells.append(tag("td", "–" if value is None else f"{value:.{digits}f}", tag("small", change)))
    return cells


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _method(entry: Any) -> str:
    """A method as a recipe writes it: a name, or a name with its parameters."""
    if not isinstance(entry, Mapping):
        return str(entry)
    told = [
        f"{name} ({', '.join(f'{key} {value}' for key, value in (given or {}).items())})" if given else str(name)
        for name, given in entry.items()
    ]
    return ", ".join(told)


def latencies(numbers: Numbers) -> Markup:
    """All runs as dots: one panel for each batch size, one line for each that was measured."""
    machine = numbers["machine"]
    panels = [_latency_panel(numbers, size) for size in numbers["noise_floor"]]
    return tag(
        "section",
        tag("h2", "Latency, run by run"),
        tag(
            "p",
            f"Each dot is one run on {machine['cpu']} with {machine['threads']} threads, {machine['system']}; the line "
            "is the median. All took turns in one run. Squares at the right edge lie beyond it.",
        ),
        *panels,
    )


def _latency_panel(numbers: Numbers, size: str) -> Markup:
    names = entries(numbers)
    runs = {name: numbers[name]["latency_runs_ms"][size] for name in names}
    longest = 1.15 * max(float(np.percentile(values, 95)) for values in runs.values())
    lines: list[Markup] = []
    for name in names:
        spread = numbers[name]["latency_ms"][size]
        label = (
            f"{title(numbers, name)}, batch {size}: median {number(spread['median'])} ms, 10th to 90th percentile "
            f"{number(spread['p10'])} to {number(spread['p90'])}, {spread['n']} runs"
        )
        lines += [
            tag("div", title(numbers, name), class_=f"key {name}"),
            dots(runs[name], longest, name, label),
            tag("div", f"{number(spread['median'])} ms", tag("small", f"n = {spread['n']}"), class_="amount"),
        ]
    floor = numbers["noise_floor"][size]
    noise = f"The original differs from itself by {floor['p10']:.2f} to {floor['p90']:.2f}x."
    axis = tag("div", tag("span", "0"), tag("span", f"{number(longest)} ms"), class_="axis")
    return tag("figure", tag("h3", f"Batch {size}"), tag("div", *lines, axis, class_="rows"), tag("figcaption", noise))
