"""Fold weights that torch saves as parts, such as those of weight_norm; exact in eval mode.

    weight_norm      w = g * v / ||v||              weight_g, weight_v or parametrizations.weight.original0, original1
    spectral_norm    w = w_orig / (u . W v)         weight_orig, weight_u, weight_v or
                                                    parametrizations.weight.original, 0._u, 0._v
    prune            w = w_orig * mask              weight_orig, weight_mask

W is w_orig as a matrix with one row per output channel, which is dimension 1 in transposed convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

_PARTS = (
    re.compile(r"(?P<of>.*)parametrizations\.(?P<name>\w+)\.(?P<part>original[01]?|0\._[uv])"),
    re.compile(r"(?P<of>.*?)(?P<name>[^.]+)_(?P<part>[guv]|orig|mask)"),
)
_NAMED = {"g": "original0", "orig": "original", "u": "0._u"}


def fold(tensors: dict[str, Tensor], transposed: Iterable[str]) -> dict[str, Tensor]:
    """Return the `state_dict` with plain weights; other tensors stay as they are.

    Args:
        tensors: by key.
        transposed: keys of the weights of transposed convolutions, without a prefix.
    """
    parts: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, value in tensors.items():
        match = next((found for found in (pattern.fullmatch(key) for pattern in _PARTS) if found), None)
        if match:
            part = match["part"]
            parts.setdefault(match["of"] + match["name"], {})[_NAMED.get(part, part)] = (key, value)
    result = dict(tensors)
    for name, entries in parts.items():
        rows = int(any(f".{name}".endswith(f".{key}") for key in transposed))
        try:
            weight = _weight({part: value for part, (_, value) in entries.items()}, rows)
        except (RuntimeError, IndexError):  # the shapes do not fit, so the names are a coincidence
            continue
        if weight is not None:
            for key, _ in entries.values():
                del result[key]
            result[name] = weight
    return result


def _weight(parts: dict[str, Tensor], rows: int) -> Tensor | None:
    names = parts.keys()
    if names in ({"original0", "v"}, {"original0", "original1"}):
        size, direction = parts["original0"].float(), parts.get("v", parts.get("original1"))
        assert direction is not None
        direction = direction.float()
        dims = [place for place in range(direction.ndim) if not size.ndim or size.shape[place] == 1]
        return size * direction / direction.square().sum(dims, keepdim=bool(size.ndim)).sqrt()
    if names == {"original", "mask"}:
        return parts["original"] * parts["mask"]
    if names in ({"original", "0._u", "v"}, {"original", "0._u", "0._v"}):
        right = parts.get("v", parts.get("0._v"))
        assert right is not None
        weight, left = parts["original"].float(), parts["0._u"].float()
        matrix = weight.movedim(rows, 0).flatten(1)
        return weight / torch.dot(left, matrix @ right.float()) if matrix.shape == (len(left), len(right)) else None
    return None
