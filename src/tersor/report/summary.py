"""What was measured from outside: the head of the page, the figures, the stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tersor.report.templates import Markup, number, signed, table, tag
from tersor.report.verdict import (
    RUNTIMES,
    Numbers,
    Reference,
    by_batch_size,
    difference,
    place,
    reference,
    same_place,
    verdict,
)

_STAGE_HEAD = (
    *("stage", "methods", "accuracy, %", "MB", "ms, batch 1", "million mult.", "zeros, %"),
    *("cost", "validation, %"),
)


def references(numbers: Numbers) -> list[Reference]:
    """What the artifact can be compared with: the baseline too, where it is not the original at every batch size."""
    only = all(same_place(baseline, numbers["original"]) for baseline in numbers["baseline"].values())
    return ["original"] if only else ["original", "baseline"]


def entries(numbers: Numbers) -> dict[str, Mapping[str, Any]]:
    """What was measured, by its title: the original, it in other runtimes and precisions, the artifact."""
    others = {
        RUNTIMES[runtime]: entry
        for runtime, entry in numbers["candidates"].items()
        if not same_place(entry, numbers["original"])
    }
    return {"original": numbers["original"], **others, "artifact": numbers["artifact"]}


def against(name: Reference, *children: str, element: str = "div") -> Markup:
    """Shown only while that reference is picked."""
    return tag(element, *children, class_=f"against-{name}")


def head(numbers: Numbers, evidence: Mapping[str, Any] | None) -> Markup:
    """The verdict, what it compares, what it was measured on, and the picker of the reference."""
    machine = numbers["machine"]
    sentence = verdict(numbers, evidence)
    where = (
        f"{machine['cpu']}, {machine['threads']} threads, {RUNTIMES[numbers['runtime']]} "
        f"{machine['versions'].get(numbers['runtime'])}. {numbers['test_images']:,} test images, seed "
        f"{numbers['seed']}, {numbers['date'][:10]}."
    )
    return tag(
        "header",
        tag("h1", sentence[:1].upper() + sentence[1:]),
        tag("p", _compared(numbers), class_="where"),
        tag("p", where),
        *_picker(numbers),
    )


def _compared(numbers: Numbers) -> str:
    """Which file in which runtime the two references are, and what is in brackets."""
    named = by_batch_size({size: place(entry) for size, entry in numbers["baseline"].items()})
    searched = " and ".join(RUNTIMES[runtime] for runtime in numbers["candidates"])
    their = "its" if len(numbers["candidates"]) == 1 else "their"
    return (
        f"Original: original.onnx, {place(numbers['original'])}. Baseline: the same file where it is fastest without "
        f"any change, of {searched} at {their} default precision: {named}. In brackets: 95 % intervals."
    )


def _picker(numbers: Numbers) -> list[Markup]:
    names = references(numbers)
    if len(names) == 1:
        return []
    options = [
        tag(
            "label",
            tag("input", type="radio", name="reference", id=f"pick-{each}", checked="" if each == "original" else None),
            tag("span", f"the {each}"),
        )
        for each in names
    ]
    return [tag("fieldset", tag("legend", "Compare with"), *options, class_="picker")]


def figures(numbers: Numbers) -> Markup:
    """Everything measured, side by side; in the last column the artifact against the reference."""
    columns, artifact = entries(numbers), numbers["artifact"]

    def row(what: str, shown: Callable[[Numbers], str], change: Callable[[Reference], str] | None = None) -> list[str]:
        changes = [against(each, change(each), element="span") for each in references(numbers)] if change else []
        return [what, *[shown(entry) for entry in columns.values()], tag("td", *changes)]

    def less(what: str, key: str, unit: float) -> list[str]:
        return row(
            what,
            lambda of: number(of[key] / unit),
            lambda each: less_by(reference(numbers, each, "1")[key], artifact[key]),
        )

    rows = [
        row("file", lambda of: "model.onnx" if of is artifact else "original.onnx"),
        row("runtime", lambda of: RUNTIMES[of["runtime"]]),
        row("floats in", lambda of: of["precision"]),
        row(
            "accuracy, %",
            lambda of: f"{of['accuracy']:.2f}",
            lambda each: signed(artifact["accuracy"] - reference(numbers, each, "1")["accuracy"], " points"),
        ),
        row("answers kept, %", lambda of: f"{of['agreement']:.2f}"),
        less("MB", "bytes", 1e6),
        less("MB, deflated", "compressed_bytes", 1e6),
        *[_latency_row(numbers, row, size) for size in numbers["baseline"]],
        less("million multiplications", "macs", 1e6),
        less("giga bit operations", "bit_operations", 1e9),
        row("zeros in the weights, %", lambda of: f"{100 * of['sparsity']:.1f}"),
        *([row("of these under masks, %", lambda of: f"{100 * of['masked']:.1f}")] if artifact["masked"] else []),
        less("MB of memory", "peak_memory_bytes", 1e6),
        less("ms to load", "load_ms", 1),
    ]
    heads = [tag("th", title, scope="col", class_=f"key {colour(title)}") for title in columns]
    every = table(["", *heads, "change"], rows, caption="Every figure")
    return tag("section", tag("h2", "In figures"), every, *_masked(artifact))


def colour(title: str) -> str:
    """The class of an entry."""
    return title if title in {"original", "artifact"} else "baseline"


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


def _latency_row(numbers: Numbers, row: Callable[..., list[str]], size: str) -> list[str]:
    baseline = numbers["baseline"][size]

    def shown(of: Mapping[str, Any]) -> str:
        median = number(of["latency_ms"][size]["median"])
        is_baseline = of is not numbers["artifact"] and same_place(of, baseline)
        return tag("td", median, tag("small", "baseline")) if is_baseline else median

    return row(f"ms, batch {size}", shown, lambda each: difference(numbers["speedup"][each][size]))


def less_by(before: float, after: float) -> str:
    """ "3.82x less"; nothing where one of the two is zero."""
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
            f"{number(minutes, 2)} minutes in all. Under each figure, the change against the row above; under the "
            "milliseconds, the speed against the original. All of it is of the test set in the runtime, except for the "
            "last column.",
        ),
        table(
            _STAGE_HEAD,
            rows,
            caption="Stages",
        ),
    )


def _state(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[Markup]:
    """Accuracy, MB, ms, multiplications and sparsity, each with its change where both are known."""

    def cell(key: str, scale: float, unit: str, digits: int) -> Markup:
        value, was = _scaled(now.get(key), scale), _scaled(before.get(key), scale)
        change = "" if value is None or was is None else signed(value - was, unit, digits)
        return tag("td", "–" if value is None else f"{value:.{digits}f}", tag("small", change))

    return [
        cell("accuracy", 1, " points", 2),
        cell("bytes", 1e6, "", 3),
        _latency_cell(now),
        cell("macs", 1e6, "", 2),
        cell("sparsity", 0.01, "", 1),
    ]


def _latency_cell(now: Mapping[str, Any]) -> Markup:
    if "latency_ms" not in now:
        return tag("td", "–", tag("small"))
    change = difference(now["speedup"]["1"]) if "speedup" in now else ""
    return tag("td", f"{now['latency_ms']['1']['median']:.3f}", tag("small", change))


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
