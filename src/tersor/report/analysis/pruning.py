"""Pruning in the report: example masks and layer widths."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tersor.graph.layer_selection import weighted_layers
from tersor.pruning.mask import weight_mask
from tersor.report.analysis.predictions import evenly_spaced

_LAYERS, _FILTERS, _CHANNELS = 6, 8, 16


def masks(model: nn.Module) -> list[dict[str, Any]]:
    """Masks of up to six masked layers, evenly spaced from the first to the last.

    Each has its `name`, the `shape` of its weight (C_out, C_in, ...), the fraction `masked` and `filters`: of up
    to 8 filters and 16 input channels, the kernel row by row as a string of 1 (not masked) and 0 (masked).
    """
    every = {name: weight_mask(layer) for name, layer in weighted_layers(model).items()}
    masked = [(name, mask.mask) for name, mask in every.items() if mask is not None]
    return [_example(*masked[index]) for index in evenly_spaced(len(masked), _LAYERS).tolist()]


def _example(name: str, mask: Tensor) -> dict[str, Any]:
    first = mask[:_FILTERS, :_CHANNELS]
    kernels = first.reshape(*first.shape[:2], -1).int().tolist()
    return {
        "name": name,
        "shape": list(mask.shape),
        "masked": 1 - int(mask.sum()) / mask.numel(),
        "filters": [["".join(map(str, kernel)) for kernel in channels] for channels in kernels],
    }


def widths(before: nn.Module, after: nn.Module) -> list[dict[str, Any]]:
    """Output channels `before` and `after` of each layer that both networks have, by `name`, in order."""
    originals = weighted_layers(before)
    return [
        {"name": name, "before": len(originals[name].weight), "after": len(layer.weight)}
        for name, layer in weighted_layers(after).items()
        if name in originals
    ]
