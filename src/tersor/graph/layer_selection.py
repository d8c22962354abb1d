"""Layer selection by name patterns. A pattern that matches nothing is an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from tersor.core.errors import InputError, nearest

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer = Convolution | nn.Linear


def weighted_layers(model: nn.Module) -> dict[str, Layer]:
    """The convolutions and fully connected layers of `model` by name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Layer)}


def matching(patterns: Sequence[str], names: Iterable[str]) -> set[str]:
    """The `names` that match a pattern (`layer1.*.conv2`; `*` also matches dots), or start with one and a dot.

    Raises:
        InputError: a pattern matches no name.
    """
    known = list(names)
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in known if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")}
        if not found:
            close = nearest(pattern, known)
            hint = f" Did you mean '{close}'?" if close else ""
            shown = ", ".join(known[:12]) + (f", ... ({len(known)} in all)" if len(known) > 12 else "")
            raise InputError(f"the pattern '{pattern}' matches no layer.{hint} Layers: {shown}.")
        chosen |= found
    return chosen


def prunable(model: nn.Module, patterns: Sequence[str] = ()) -> dict[str, Layer]:
    """The layers to prune: those that match `patterns`; by default the convolutions, or the fully connected layers if
    there is no convolution.

    Raises:
        InputError: a pattern matches no layer, or there is no layer at all.
    """
    layers = weighted_layers(model)
    if patterns:
        chosen = matching(patterns, layers)
        return {name: layer for name, layer in layers.items() if name in chosen}
    convolutions: dict[str, Layer] = {name: layer for name, layer in layers.items() if isinstance(layer, Convolution)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no convolution and no fully connected layer to prune.")
    return convolutions or layers


def without(layers: Mapping[str, Layer], patterns: Sequence[str]) -> dict[str, Layer]:
    """The `layers` that match no pattern."""
    left_out = matching(patterns, layers)
    return {name: layer for name, layer in layers.items() if name not in left_out}
