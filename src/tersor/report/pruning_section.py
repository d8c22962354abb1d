"""What pruning did: where the zeros are, masks of a few filters, how wide the network is, how masks and accuracy moved
while it trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from tersor.report.charts import columns, line, mask_grid, silhouette
from tersor.report.summary import Numbers
from tersor.report.templates import Markup, number, tag

Evidence = Mapping[str, Any]

_LAST = 5
"""Measurements at the end of a stage whose spread is told."""


def pruned(evidence: Evidence) -> Markup:
    """Zeros by layer, masks and widths; nothing where no weight is zero and no channel is gone."""
    parts = [_zeros(evidence["layers"]), _masks(evidence["masks"]), _widths(evidence["widths"])]
    if not any(parts):
        return Markup("")
    return tag("section", tag("h2", "What was pruned"), *parts)


def _zeros(layers: Sequence[Mapping[str, Any]]) -> Markup:
    if not any(layer["zeros"] for layer in layers):
        return Markup("")
    masked = any(layer["masked"] for layer in layers)
    groups = [
        (layer["name"], {**({"masked": 100 * layer["masked"]} if masked else {}), "zeros": 100 * layer["sparsity"]})
        for layer in layers
    ]
    told = [
        tag("span", "under a mask", class_="key original") if masked else "",
        ", " if masked else "",
        tag("span", "zero in all" if masked else "zero", class_="key artifact"),
        ", with what rounding makes zero." if masked else ": what rounding makes zero.",
    ]
    label = "percent of zeros in each layer, from the first to the last"
    return tag(
        "div",
        tag("h3", "Sparsity of each layer, from the first to the last"),
        tag("p", "Of its weights, up to 100 %: ", *told),
        columns(groups, label, height=84, largest=100),
    )


def _masks(masks: Sequence[Mapping[str, Any]]) -> Markup:
    if not masks:
        return Markup("")
    return tag(
        "div",
        tag("h3", "Masks of a few layers"),
        tag(
            "p",
            "Each row is a filter, each block in it the kernel of one input channel, each square a weight: filled "
            "ones are kept.",
        ),
        tag("div", *map(_mask, masks), class_="grid wide"),
    )


def _mask(told: Mapping[str, Any]) -> Markup:
    shape, filters = told["shape"], told["filters"]
    kernel = (math.prod(shape[2:-1]), shape[-1]) if len(shape) > 2 else (1, 1)
    text = (
        f"filters 1 to {len(filters)} of {shape[0]:,}, channels 1 to {len(filters[0])} of {shape[1]:,}; of the whole "
        f"layer {100 * told['masked']:.1f} % masked"
    )
    name = told["name"]
    return tag("figure", tag("h4", name), mask_grid(filters, kernel, f"{name}: {text}"), tag("figcaption", text))


def _widths(widths: Sequence[Mapping[str, Any]]) -> Markup:
    lost = [each for each in widths if each["after"] != each["before"]]
    if not lost:
        return Markup("")
    before, after = (sum(each[key] for each in widths) for key in ("before", "after"))
    text = f"{after:,} of {before:,} channels are left; {len(lost)} of {len(widths)} layers lost some"
    return tag(
        "div",
        tag("h3", "Width of the network, from the first layer to the last"),
        tag(
            "p",
            tag("span", "Before the first stage", class_="key original"),
            " and ",
            tag("span", "now", class_="key artifact"),
            f": the output channels of each layer. {text}.",
        ),
        silhouette([(each["name"], each["before"], each["after"]) for each in widths], text),
    )


def moved(numbers: Numbers) -> Markup:
    """A figure for each stage whose masks moved or whose accuracy was measured on the way; nothing where none was."""
    told = [stage for stage in numbers["stages"] if stage["steps"] and (_masked(stage) or _accuracies(stage))]
    if not told:
        return Markup("")
    changed = [value for stage in told for masked in _masked(stage) for _, value in masked["changed"]]
    accuracies = [value for stage in told for _, value in _accuracies(stage)]
    most, edges = max(changed, default=0.0), (min(accuracies, default=0.0), max(accuracies, default=0.0))
    of_masks = (
        " Changed: the fraction of all entries of the masks that differ from the masks before, drawn up to "
        f"{_percents(most)}."
    )
    of_accuracy = f" Validation is drawn from {edges[0]:.2f} to {edges[1]:.2f} %."
    return tag(
        "section",
        tag("h2", "While it trained"),
        tag(
            "p",
            "Over the steps of a stage, all stages on the same scale.",
            of_masks if changed else "",
            of_accuracy if accuracies else "",
        ),
        tag("div", *[_stage(stage, most, edges) for stage in told], class_="grid moving"),
    )


Points = Sequence[tuple[int, float]]


def _masked(stage: Mapping[str, Any]) -> list[dict[str, Points]]:
    """Of each method that made masks anew: sparsity and what changed, over the steps at which it did."""
    return [
        {kind: list(zip(told["steps"], told[kind], strict=True)) for kind in ("sparsity", "changed")}
        for told in stage.get("masks", ())
        if told["steps"]
    ]


def _accuracies(stage: Mapping[str, Any]) -> Points:
    return list(zip(stage.get("validated_at", ()), stage.get("validation_by_epoch", ()), strict=True))


def _stage(stage: Mapping[str, Any], most: float, edges: tuple[float, float]) -> Markup:
    rows: list[Markup] = []
    for kind, points in [pair for masked in _masked(stage) for pair in masked.items()]:
        last = _percents(points[-1][1])
        high = 1.0 if kind == "sparsity" else most
        rows += _row(kind, line(points, stage["steps"], (0.0, high), kind, f"{kind}: {last} at last"), last)
    accuracies = _accuracies(stage)
    if accuracies:
        label = "validation: " + ", ".join(f"{value:.2f} % after step {step:,}" for step, value in accuracies)
        drawn = line(accuracies, stage["steps"], edges, "accuracy", label, height=96)
        rows += _row("validation", drawn, f"{accuracies[-1][1]:.2f} %")
    axis = tag("div", tag("span", "0"), tag("span", f"{stage['steps']:,} steps"), class_="axis")
    swing = [tag("figcaption", _swing([value for _, value in accuracies]))] if len(accuracies) >= _LAST else []
    return tag("figure", tag("h4", stage["name"]), tag("div", *rows, axis, class_="rows"), *swing)


def _row(name: str, drawn: Markup, last: str) -> list[Markup]:
    return [tag("div", name), drawn, tag("div", last, tag("small", "at last"), class_="amount")]


def _swing(values: Sequence[float]) -> str:
    last = values[-_LAST:]
    return f"validation, last {_LAST} of {len(values)}: mean {mean(last):.2f} %, standard deviation {stdev(last):.2f}"


def _percents(fraction: float) -> str:
    return f"{number(100 * fraction)} %"
