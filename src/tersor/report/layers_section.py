"""What was looked at inside: where the time goes, every layer, weights on their grid."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tersor.evaluation.costs import FLOAT_BITS
from tersor.quantization.integer_coverage import ENOUGH, percent
from tersor.report.charts import bar, columns, histogram
from tersor.report.summary import against, references
from tersor.report.templates import Markup, number, table, tag
from tersor.report.verdict import Numbers, Reference, place, reference

Evidence = Mapping[str, Any]

_KINDS = 7
_HISTOGRAMS = 12


def time_spent(numbers: Numbers, evidence: Evidence) -> Markup:
    """Node profiles before and after, by operator and layer by layer."""
    compared = [
        against(each, *[_profiles(numbers, evidence, each, size) for size in evidence["profile"]])
        for each in references(numbers)
    ]
    return tag(
        "section",
        tag("h2", "Where the time goes"),
        tag(
            "p",
            "By the runtime's own profile of its nodes, medians of 20 runs. To be watched costs some microseconds a "
            "node: where nodes are short, the sum is more than the latency, and shares tell more than milliseconds.",
        ),
        *compared,
    )


def _profiles(numbers: Numbers, evidence: Evidence, name: Reference, size: str) -> Markup:
    told = evidence["profile"][size]
    before, after = told[name], told["artifact"]
    title = f"{name}, {place(reference(numbers, name, size))}"
    largest = max(kind["ms"] for kind in [*before["kinds"], *after["kinds"]])
    lists = [
        _operators(before, largest, name, f"{title}: {number(before['ms'])} ms in nodes"),
        _operators(after, largest, "artifact", f"artifact: {number(after['ms'])} ms in nodes"),
    ]
    groups = [
        (layer["name"], {name: before["layers"].get(layer["name"], 0.0)} | {
            "artifact": after["layers"].get(layer["name"], 0.0)})
        if layer["original_shape"]
        else (layer["name"], {"artifact": after["layers"].get(layer["name"], 0.0)})
        for layer in evidence["layers"]
    ]  # fmt: skip
    label = f"milliseconds of each layer at batch {size}, from the first to the last"
    return tag(
        "figure",
        tag("h3", f"Batch {size}"),
        tag("div", *lists, class_="pair"),
        tag("h4", "Each layer, from the first to the last"),
        columns(groups, label),
    )


def _operators(profile: Mapping[str, Any], largest: float, kind: str, title: str) -> Markup:
    shown = [(each["kind"], each["nodes"], each["ms"]) for each in profile["kinds"][:_KINDS]]
    rest = profile["kinds"][_KINDS:]
    if rest:
        shown.append((f"{len(rest)} others", sum(each["nodes"] for each in rest), sum(each["ms"] for each in rest)))
    lines: list[Markup] = []
    for operator, nodes, ms in shown:
        share = _share(ms, profile["ms"])
        lines += [
            tag("div", operator, tag("small", f"× {nodes}"), class_="operator", title=operator),
            bar(ms, largest, kind, f"{operator}: {number(ms)} ms in {nodes} nodes, {share} of all"),
            tag("div", f"{number(ms)} ms", tag("small", share), class_="amount"),
        ]
    return tag("div", tag("h4", title, class_=f"key {kind}"), tag("div", *lines, class_="rows"))


def _share(part: float, whole: float) -> str:
    return "<1 %" if 100 * part < whole else f"{100 * part / whole:.0f} %"


def layers(numbers: Numbers, evidence: Evidence) -> Markup:
    """One row for each layer; what its error is beside the others'; what bits give and save."""
    size, profile = next(iter(evidence["profile"].items()))
    head = [*("layer", "weight", "channels kept", "zeros", "sparsity, %", "bits w / a", "levels", "clipped, %")]
    head += ["error, %", "million mult.", f"ms, batch {size}"]
    rows = [_layer_row(layer, profile) for layer in evidence["layers"]]
    same = any(layer["original_shape"] for layer in evidence["layers"])
    other = "" if same else " The original is another network, so there is no layer of it to compare with."
    return tag(
        "section",
        tag("h2", "Layer by layer"),
        tag(
            "p",
            f"Clipped: values that enter the layer outside of its input's grid, on {evidence['looked_at']} test images."
            " Error: how far off the layer answers, rounded against unrounded, as |y − y′| / |y|. Levels: the integers"
            f" that its weights use. Bits of weights and activations; 32 is float.{other}",
        ),
        table(head, rows, caption="Layers"),
        _in_float(numbers["artifact"]),
        _errors(evidence),
        _bits(numbers, evidence),
    )


def _in_float(artifact: Mapping[str, Any]) -> Markup:
    """Convolutions and matrix products that are not computed in integers, and what is in no count."""
    parts: list[Markup] = []
    share, operators = artifact["integer_macs_share"], artifact["float_operators"]
    if operators:
        warning = "Warning: only " if share < ENOUGH else ""
        text = f"{warning}{percent(share)} of the MACs are in integers. The others, and why:"
        rows = [
            (each["name"] or "–", each["kind"], f"{each['macs'] / 1e6:.2f}", percent(each["share"]), each["reason"])
            for each in operators
        ]
        head = ["operator", "kind", "million mult.", "share", "in float, since"]
        parts += [tag("h3", "In float"), tag("p", text), table(head, rows, caption="In float")]
    if artifact["uncounted_operators"]:
        parts.append(tag("p", f"In no count of multiplications: {', '.join(artifact['uncounted_operators'])}."))
    return tag("div", *parts) if parts else Markup("")


def _errors(evidence: Evidence) -> Markup:
    groups = [
        (layer["name"], {} if layer["error"] is None else {"artifact": 100 * layer["error"]})
        for layer in evidence["layers"]
    ]
    if not any(values for _, values in groups):
        return Markup("")
    label = "percent of error of each layer, from the first to the last"
    return tag("div", tag("h3", "Error of each layer, from the first to the last"), columns(groups, label, height=64))


def _bits(numbers: Numbers, evidence: Evidence) -> Markup:
    """How many levels a weight may have and what multiplying costs, of all layers with the same bits together."""
    groups: defaultdict[tuple[int, int], list[Mapping[str, Any]]] = defaultdict(list)
    for layer in evidence["layers"]:
        groups[layer["weight_bits"], layer["activation_bits"]].append(layer)
    rows: list[list[str]] = []
    for (weight, activation), members in sorted(groups.items(), reverse=True):
        if not 0 <= weight <= FLOAT_BITS:
            raise ValueError(f"a weight of {weight} bits")
        macs, used = sum(each["macs"] for each in members), [each["levels"] for each in members if each["levels"]]
        rows.append(
            [
                f"{weight} / {activation}",
                f"{len(members)}",
                f"{sum(math.prod(each['shape']) for each in members):,}",
                tag("td", "2", tag("sup", f"{weight}"), f" = {2**weight:,}" if used else ""),
                f"{max(used)}" if used else "–",
                number(macs * weight * activation / 1e9),
                number(macs * FLOAT_BITS**2 / 1e9),
            ]
        )
    giga = [number(numbers[entry]["bit_operations"] / 1e9) for entry in ("original", "artifact")]
    head = ["bits w / a", "layers", "weights", "levels there are", "used, at most", "giga bit operations", "in float"]
    return tag(
        "div",
        tag("h3", "Levels and bit operations"),
        tag(
            "p",
            "A weight in float is one of 2", tag("sup", f"{FLOAT_BITS}"),
            ", on a grid of b bits one of 2", tag("sup", "b"),
            ". A multiplication counts as many bit operations as bits of the weight times bits of the activation: "
            f"{giga[0]} giga in the original, {giga[1]} in the artifact.",
        ),
        table(head, rows, caption="Levels and bit operations"),
    )  # fmt: skip


def _layer_row(layer: Mapping[str, Any], profile: Mapping[str, Any]) -> list[str]:
    before, now = layer["original_shape"], layer["shape"]
    kept = "–" if before is None else f"out {now[0]}/{before[0]}, in {now[1]}/{before[1]}"
    spent = [profile[entry]["layers"].get(layer["name"]) for entry in ("original", "artifact")]
    return [
        layer["name"],
        _shape(now) if before in (None, now) else f"{_shape(before)} → {_shape(now)}",
        kept,
        f"{layer['zeros']:,}",
        f"{100 * layer['sparsity']:.1f}",
        f"{layer['weight_bits']} / {layer['activation_bits']}",
        "–" if layer["levels"] is None else str(layer["levels"]),
        _percent(layer["clipped"]),
        _percent(layer["error"]),
        f"{layer['macs'] / 1e6:.2f}",
        number(spent[1]) if before is None else f"{number(spent[0])} → {number(spent[1])}",
    ]


def _shape(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))


def _percent(fraction: float | None) -> str:
    if fraction is None:
        return "–"
    return "<0.01" if 0 < fraction < 1e-4 else number(100 * fraction, 2)


def weights(evidence: Evidence) -> Markup:
    """The histogram of every layer: the first few at once, the others when asked for."""
    drawn = [_weight_figure(layer) for layer in evidence["layers"]]
    first, others = drawn[:_HISTOGRAMS], drawn[_HISTOGRAMS:]
    more = [
        tag("details", tag("summary", f"The other {len(others)} layers"), tag("div", *others, class_="grid"))
    ] if others else []  # fmt: skip
    return tag(
        "section",
        tag("h2", "Weights on their grid"),
        tag(
            "p",
            tag("span", "Area", class_="key original"),
            ": before rounding (of a layer in float: in the original). ",
            tag("span", "Bars", class_="key artifact"),
            ": as they are stored. Each weight is divided by its channel's step, so the grid lies on the whole numbers."
            " Height is density; the bar of the zeros is cut off where it is far higher than all others.",
        ),
        tag("div", *first, class_="grid"),
        *more,
    )


def _weight_figure(layer: Mapping[str, Any]) -> Markup:
    told = layer["histogram"]
    span = max(len(told["before"]) * told["width"], len(told["shown"]) * told["shown_width"])
    ends = (told["low"], told["low"] + span)
    if told["step"] is None:
        text = f"float, {layer['zeros']:,} zeros"
    else:
        steps = [number(told["step"][place]) for place in (0, 2)]
        text = (
            f"step {steps[0] if steps[0] == steps[1] else ' to '.join(steps)}, grid {_minus(told['grid'][0])} to "
            f"{told['grid'][1]}, {layer['levels']} levels, {layer['zeros']:,} zeros"
        )
    axis = tag("div", *[tag("span", _minus(f"{end:.3g}")) for end in ends], class_="axis")
    drawing = histogram(told, f"weights of {layer['name']}: {text}")
    return tag("figure", tag("h4", layer["name"]), drawing, axis, tag("figcaption", text))


def _minus(value: object) -> str:
    return str(value).replace("-", "−")
