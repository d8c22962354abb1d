"""Values of the report's sections on layers: node profiles, bit widths, weight histograms."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tersor.evaluation.costs import FLOAT_BITS
from tersor.report.charts import Columns
from tersor.report.templating import number
from tersor.report.verdict import Reference

Layers = Sequence[Mapping[str, Any]]

_OPERATORS = 7


class OperatorTime(NamedTuple):
    """Nodes of one operator and their time; `share` of the time of all nodes."""

    operator: str
    nodes: int
    ms: float
    share: str


def operator_times(profile: Mapping[str, Any]) -> list[OperatorTime]:
    """The slowest operators, and the others in one row."""
    times = [(each["kind"], each["nodes"], each["ms"]) for each in profile["kinds"][:_OPERATORS]]
    rest = profile["kinds"][_OPERATORS:]
    if rest:
        times.append((f"{len(rest)} others", sum(each["nodes"] for each in rest), sum(each["ms"] for each in rest)))
    return [OperatorTime(*each, _share(each[-1], profile["ms"])) for each in times]


def _share(part: float, whole: float) -> str:
    return "<1 %" if 100 * part < whole else f"{100 * part / whole:.0f} %"


def layer_times(layers: Layers, profiles: Mapping[str, Any], reference: Reference) -> Columns:
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


def output_errors(layers: Layers) -> Columns:
    """Output error of each layer in percent; no columns if no layer is quantized."""
    if all(layer["error"] is None for layer in layers):
        return []
    return [
        (layer["name"], {} if layer["error"] is None else {"artifact": 100 * layer["error"]}) for layer in layers
    ]


class BitGroup(NamedTuple):
    """Layers of the same bit widths together; `levels` are the most that one uses, None for floats."""

    weight_bits: int
    activation_bits: int
    layers: int
    weights: int
    levels: int | None
    bit_operations: float
    float_bit_operations: float


def bit_groups(layers: Layers) -> list[BitGroup]:
    """Layers grouped by bit widths, the widest first.

    Raises:
        ValueError: a layer has a bit width that does not exist.
    """
    groups: defaultdict[tuple[int, int], list[Mapping[str, Any]]] = defaultdict(list)
    for layer in layers:
        groups[layer["weight_bits"], layer["activation_bits"]].append(layer)
    rows: list[BitGroup] = []
    for (weight, activation), members in sorted(groups.items(), reverse=True):
        if not 0 <= weight <= FLOAT_BITS:
            raise ValueError(f"a weight of {weight} bits")
        macs, levels = sum(each["macs"] for each in members), [each["levels"] for each in members if each["levels"]]
        weights = sum(math.prod(each["shape"]) for each in members)
        operations = (macs * weight * activation, macs * FLOAT_BITS**2)
        rows.append(BitGroup(weight, activation, len(members), weights, max(levels, default=None), *operations))
    return rows


def histogram_end(histogram: Mapping[str, Any]) -> float:
    """The upper end of the axis."""
    return histogram["low"] + max(
        len(histogram[side]) * histogram[width] for side, width in (("before", "width"), ("after", "after_width"))
    )


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
