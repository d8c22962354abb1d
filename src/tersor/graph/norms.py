"""Which BatchNorm normalises what a layer gives."""

from __future__ import annotations

from torch import nn

from tersor.core.freezing import Norm
from tersor.core.selection import Layer
from tersor.graph.capture import capture, layer_of, sole_user


def norms_behind(model: nn.Module) -> dict[str, Norm]:
    """Layer -> the BatchNorm that alone reads what it gives, of those layers that have one; by the captured graph.

    Raises:
        InputError: the network cannot be captured.
    """
    found: dict[str, Norm] = {}
    for node in capture(model).graph.nodes:
        behind = sole_user(node) if isinstance(layer_of(node), Layer) else None
        norm = None if behind is None else layer_of(behind)
        if isinstance(norm, Norm):
            found[str(node.target)] = norm
    return found
