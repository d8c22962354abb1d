"""Values of the report's sections on layers: node profiles, bit widths, weight histograms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tersor.evaluation.costs import FLOAT_BITS
from tersor.report.charts import Groups
from tersor.report.templating import number
from tersor.report.verdict import Reference

LayerRows = Sequence[Mapping[str, Any]]

_OPERATORS = 7


def operator_times(profile: Mapping[str, Any]) -> Iterator[tuple[str, int, float, str]]:
    """Operator, nodes, milliseconds and share of the slowest operators, and of all others together."""
    times = [(each["kind"], each["nodes"], each["ms"]) for each in profile["kinds"]]
    rest = times[_OPERATORS:]
    others = (
        [
            (
                f"{len(rest)} other{'s' if len(rest) > 1 else ''}",
                sum(nodes for _, nodes, _ in rest),
                sum(ms for *_, ms in rest),
            )
        ]
        if rest
        else []
    )
    for operator, nodes, ms in times[:_OPERATORS] + others:
        share = "<1 %" if 100 * ms < profile["ms"] else f"{100 * ms / profile['ms']:.0f} %"
        yield operator, nodes, ms, share


def layer_times(layers: LayerRows, profiles: Mapping[str, Any], reference: Reference) -> Groups:
    """Milliseconds of each layer; also of the reference, if it has the same layers."""
    return [
        (
            layer["name"],
            {
                name: profiles[name]["layers"].get(layer["name"], 0.0)
                for name in ([reference] if layer["original_shape"] else []) + ["artifact"]
            },
        )
        for layer in layers
    ]


def output_errors(layers: LayerRows) -> Groups:
    """Output error of each layer in percent; None for a layer that is not quantized."""
    return [(layer["name"], None if layer["error"] is None else 100 * layer["error"]) for layer in layers]


def sparsity(layers: LayerRows) -> Groups:
    """Zeros of each layer in percent, and those under a mask if any layer has one."""
    masked = any(layer["masked"] for layer in layers)
    return [
        (layer["name"], {**({"masked": 100 * layer["masked"]} if masked else {}), "zeros": 100 * layer["sparsity"]})
        for layer in layers
    ]


def narrowed(widths: LayerRows) -> int:
    """How many layers lost channels."""
    return sum(layer["after"] != layer["before"] for layer in widths)


def bit_groups(layers: LayerRows) -> list[tuple[tuple[int, int], list[Mapping[str, Any]]]]:
    """Layers grouped by the bits of weights and activations, the widest first.

    Raises:
        ValueError: a layer has a bit width that does not exist.
    """
    groups: defaultdict[tuple[int, int], list[Mapping[str, Any]]] = defaultdict(list)
    for layer in layers:
        if not 0 <= layer["weight_bits"] <= FLOAT_BITS:
            raise ValueError(f"a weight of {layer['weight_bits']} bits")
        groups[layer["weight_bits"], layer["activation_bits"]].append(layer)
    return sorted(groups.items(), key=lambda group: group[0], reverse=True)


def describe_weights(layer: Mapping[str, Any]) -> str:
    """Step sizes, grid, levels and zeros of a layer's weights."""
    histogram = layer["histogram"]
    if histogram["step"] is None:
        return f"float, {layer['zeros']:,} zeros"
    low, _, high = map(number, histogram["step"])
    first, last = (str(point).replace("-", "−") for point in histogram["grid"])
    step = low if low == high else f"{low} to {high}"
    return f"step {step}, grid {first} to {last}, {layer['levels']} levels, {layer['zeros']:,} zeros"


def describe_fraction(fraction: float | None) -> str:
    """In percent, without the sign; a dash for None."""
    if fraction is None:
        return "–"
    return "<0.01" if 0 < fraction < 1e-4 else number(100 * fraction, 2)
