"""Values of the report's section on pruning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tersor.report.charts import Columns
from tersor.report.verdict import Evidence


def sparsity_columns(layers: Sequence[Mapping[str, Any]]) -> Columns:
    """Zeros of each layer in percent, and those under a mask if any layer has one."""
    masked = any(layer["masked"] for layer in layers)
    return [
        (layer["name"], {**({"masked": 100 * layer["masked"]} if masked else {}), "zeros": 100 * layer["sparsity"]})
        for layer in layers
    ]


def narrowed_layers(widths: Sequence[Mapping[str, Any]]) -> int:
    """How many layers lost channels."""
    return sum(layer["after"] != layer["before"] for layer in widths)


def is_pruned(evidence: Evidence) -> bool:
    """Whether a weight is zero or masked, or a channel was removed."""
    zeros = any(layer["zeros"] for layer in evidence["layers"])
    return zeros or bool(evidence["masks"]) or narrowed_layers(evidence["widths"]) > 0
