"""Exact top-k masks from scores. Sparsity counts weights; of equal scores the later index is masked.

A unit is masked as a whole: a weight, a kernel (all weights between two channels) or a filter. The sparsity is rounded
to a whole number of weights and met exactly; with units larger than a weight it is met from above. With N:M, N of any M
consecutive weights along the input channels remain.

The global threshold is a radix select: float32 bits have the order of the values, so three passes of digit histograms
over small pieces find it. Sorting would take several times the memory of the weights; this takes two bools per score.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tersor.core.errors import InputError

Scope = Literal["layer", "global"]
UNITS = ("weight", "kernel", "filter")

_PIECE = 1 << 16
_DIGITS = ((21, 11), (10, 11), (0, 10))
"""Shift and width of the digits of 32 bits, the highest first."""
_LARGEST = 2**31 - 1


def check_granularity(text: str) -> str:
    """`text`, if it is "weight", "kernel", "filter" or "N:M".

    Raises:
        InputError: it is something else.
    """
    if text in UNITS or n_of_m(text) is not None:
        return text
    raise InputError(
        f"unknown granularity '{text}'. Possible: {', '.join(UNITS)}, or N:M such as 2:4 (N of every M consecutive "
        "weights remain, 0 < N < M)."
    )


def n_of_m(granularity: str) -> tuple[int, int] | None:
    """N and M of "N:M", or None."""
    match = re.fullmatch(r"(\d+):(\d+)", granularity)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        return None
    return int(match[1]), int(match[2])


def unit_scores(values: Tensor, granularity: str) -> Tensor:
    """Scores (C_out, C_in, ...) of weights -> (units,): unchanged, or their mean over each kernel or filter."""
    if granularity == "filter":
        return values.flatten(1).mean(1)
    if granularity == "kernel" and values.ndim > 2:
        return values.flatten(2).mean(2).flatten()
    return values.flatten()


def masks(
    scores: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    sparsity: float,
    scope: Scope,
    floor: float = 0.0,
) -> dict[str, Tensor]:
    """Bool masks (C_out, ...) by layer, False for the lowest scores; the best unit of a layer always remains.

    Args:
        scores: layer -> (units,), one for each weight, kernel or filter; -inf is masked first.
        shapes: layer -> shape of its weight.
        sparsity: fraction of the weights that is masked, in each layer or in all together.
        scope: "layer" or "global".
        floor: fraction of each layer's units, the best ones, that always remains.
    """
    units = {
        name: _Units(each, _protected(each, floor), shapes[name].numel() // len(each)) for name, each in scores.items()
    }
    by_layer: dict[str, Tensor] = {}
    for names in [[name] for name in units] if scope == "layer" else [list(units)]:
        target = round(sparsity * sum(shapes[name].numel() for name in names))
        kept = _mask_lowest([units[name] for name in names], target)
        by_layer |= {name: _expanded(part, shapes[name]) for name, part in zip(names, kept, strict=True)}
    return by_layer


def top_k_mask(scores: Tensor, count: int) -> Tensor:
    """Bool mask of the scores' shape: the `count` largest; of equal ones the first."""
    return _mask_lowest([_Units(scores.flatten(), None, 1)], scores.numel() - count)[0].reshape(scores.shape)


def n_of_m_mask(scores: Tensor, kept: int, of: int) -> Tensor:
    """Bool mask of scores (C_out, C_in, ...): the best `kept` of any `of` neighbors along C_in, a multiple of `of`."""
    grouped = scores.movedim(1, -1)
    rows = grouped.reshape(-1, of)
    best = rows.argsort(dim=1, descending=True, stable=True)[:, :kept]
    mask = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, best, value=True)
    return mask.reshape(grouped.shape).movedim(-1, 1)


@dataclass(frozen=True)
class _Units:
    """`scores` (units,), the `protected` ones (units,), and the number of weights in a unit: its `size`."""

    scores: Tensor
    protected: Tensor | None
    size: int

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices, the last one first, with int32 keys that have the order of the scores."""
        for start in reversed(range(0, len(self.scores), _PIECE)):
            piece = slice(start, start + _PIECE)
            bits = (self.scores[piece].float() + 0.0).view(torch.int32)  # -0.0 equals 0.0
            keys = (bits >> 31).bitwise_and_(_LARGEST).bitwise_xor_(bits)
            yield piece, keys if self.protected is None else keys.masked_fill_(self.protected[piece], _LARGEST)


def _protected(scores: Tensor, floor: float) -> Tensor:
    """Bool (units,): the best fraction, at least one unit; units that are masked already (-inf) are not in it."""
    count = max(1, math.ceil(floor * len(scores) - 1e-9))
    if count > 1:
        protected = _mask_lowest([_Units(scores, None, 1)], len(scores) - count)[0] & (scores != -torch.inf)
    else:
        protected = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    protected[scores.argmax()] = True
    return protected


def _mask_lowest(groups: Sequence[_Units], target: int) -> list[Tensor]:
    """Bool (units,) for each: False for the lowest scores, whose units have `target` weights together."""
    free = sum(
        (len(each.scores) - (0 if each.protected is None else int(each.protected.sum()))) * each.size for each in groups
    )
    target = min(target, free)
    remaining = [torch.ones(len(each.scores), dtype=torch.bool, device=each.scores.device) for each in groups]
    if target <= 0:
        return remaining
    threshold, below = _threshold(groups, target)
    left = target - below
    for units, kept in zip(reversed(groups), reversed(remaining), strict=True):
        for piece, keys in units.pieces():
            torch.ge(keys, threshold, out=kept[piece])
            if left > 0:
                equal = (keys == threshold).nonzero().flatten()
                masked = equal[max(0, len(equal) - math.ceil(left / units.size)) :]
                kept[piece][masked] = False
                left -= len(masked) * units.size
    return remaining


def _threshold(groups: Sequence[_Units], target: int) -> tuple[int, int]:
    """The lowest key with at least `target` weights up to it, and the number of weights below it."""
    prefix, below = 0, 0
    for shift, width in _DIGITS:
        first = shift + width == 32
        counts = torch.zeros(2**width, dtype=torch.long, device=groups[0].scores.device)
        for units in groups:
            for _, keys in units.pieces():
                if first:
                    digits = (keys >> shift) + 2 ** (width - 1)  # the sign is the highest bit
                else:
                    digits = (keys[(keys >> (shift + width)) == prefix] >> shift) & (2**width - 1)
                counts += (torch.bincount(digits, minlength=2**width) * units.size).to(counts.device)
        reached = counts.cumsum(0) + below
        digit = int((reached < target).sum())
        below = int(reached[digit - 1]) if digit else below
        prefix = digit - 2 ** (width - 1) if first else prefix << width | digit
    return prefix, below


def _expanded(kept: Tensor, shape: torch.Size) -> Tensor:
    if len(kept) == shape.numel():
        return kept.reshape(shape)
    whole = shape[:1] if len(kept) == shape[0] else shape[:2]
    return kept.reshape(*whole, *[1] * (len(shape) - len(whole))).expand(shape).contiguous()
