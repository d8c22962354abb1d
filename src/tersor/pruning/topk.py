"""Scores -> exact masks. What is masked is counted in weights, and ties go by index: the later one is masked.

A unit is what a mask keeps or drops as a whole: a weight, a kernel (all weights between two channels) or a filter. A
fraction of them is rounded to a whole number of weights, so that a sparsity is met exactly; where units are larger
than a weight, it is met from above. With N:M, N of any M weights stay that lie one behind the other along the input
channels.

The threshold of a whole network is found digit by digit: the bits of a float32 are in the order of its values, so
three passes count how many scores have which bits, in small pieces. Nothing is sorted and nothing is laid end to end:
beside the scores there are two bits of memory for each of them, as bools, where sorting takes several times the
weights.
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


def known_granularity(text: str) -> str:
    """`text`, if it is one: "weight", "kernel", "filter" or "N:M".

    Raises:
        InputError: it is none.
    """
    if text in UNITS or pattern(text) is not None:
        return text
    raise InputError(
        f"granularity '{text}' is none. Possible: {', '.join(UNITS)}, or N:M such as 2:4 (of any M weights N stay, "
        "0 < N < M)."
    )


def pattern(granularity: str) -> tuple[int, int] | None:
    """N and M of "N:M", or None."""
    found = re.fullmatch(r"(\d+):(\d+)", granularity)
    if found is None or not 0 < int(found[1]) < int(found[2]):
        return None
    return int(found[1]), int(found[2])


def unit_scores(values: Tensor, granularity: str) -> Tensor:
    """Scores (C_out, C_in, ...) of weights -> (units,): as they are, or their mean over each kernel or filter."""
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
    """Bool masks (C_out, ...) by layer, False at the units of lowest score; the best unit of a layer always stays.

    Args:
        scores: layer -> (units,), as many as weights, kernels or filters; what has -inf goes first.
        shapes: layer -> shape of its weight.
        sparsity: fraction of the weights that is masked, in each layer or in all together.
        scope: "layer" or "global".
        floor: fraction of each layer's units, the best ones, that stays whatever the others are.
    """
    units = {name: _Units(each, _best(each, floor), shapes[name].numel() // len(each)) for name, each in scores.items()}
    found: dict[str, Tensor] = {}
    for names in [[name] for name in units] if scope == "layer" else [list(units)]:
        target = round(sparsity * sum(shapes[name].numel() for name in names))
        kept = _kept([units[name] for name in names], target)
        found |= {name: _in_shape(part, shapes[name]) for name, part in zip(names, kept, strict=True)}
    return found


def best_of(scores: Tensor, count: int) -> Tensor:
    """Bool, of the shape of the scores: the `count` largest; of equal ones the first."""
    return _kept([_Units(scores.flatten(), None, 1)], scores.numel() - count)[0].reshape(scores.shape)


def pattern_mask(scores: Tensor, kept: int, of: int) -> Tensor:
    """Bool mask of scores (C_out, C_in, ...): of any `of` neighbours along C_in, which it divides, the best `kept`."""
    grouped = scores.movedim(1, -1)
    rows = grouped.reshape(-1, of)
    best = rows.argsort(dim=1, descending=True, stable=True)[:, :kept]
    mask = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, best, value=True)
    return mask.reshape(grouped.shape).movedim(-1, 1)


@dataclass(frozen=True)
class _Units:
    """`scores` and what `stays`, each (units,), and how many weights a unit has: its `size`."""

    scores: Tensor
    stays: Tensor | None
    size: int

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Places, and int32 keys in the order of the scores there; the last places first."""
        for start in reversed(range(0, len(self.scores), _PIECE)):
            place = slice(start, start + _PIECE)
            bits = (self.scores[place].float() + 0.0).view(torch.int32)  # -0.0 is as large as 0.0
            keys = (bits >> 31).bitwise_and_(_LARGEST).bitwise_xor_(bits)
            yield place, keys if self.stays is None else keys.masked_fill_(self.stays[place], _LARGEST)


def _best(scores: Tensor, floor: float) -> Tensor:
    """Bool (units,): so large a fraction that is best, at least one; a layer without a weight passes nothing on. What
    is masked already, -inf, is not among them.
    """
    count = max(1, math.ceil(floor * len(scores) - 1e-9))
    if count > 1:
        stays = _kept([_Units(scores, None, 1)], len(scores) - count)[0] & (scores != -torch.inf)
    else:
        stays = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    stays[scores.argmax()] = True
    return stays


def _kept(groups: Sequence[_Units], target: int) -> list[Tensor]:
    """Bool (units,) for each: all but the units of lowest score that together have `target` weights."""
    free = sum((len(each.scores) - (0 if each.stays is None else int(each.stays.sum()))) * each.size for each in groups)
    target = min(target, free)
    found = [torch.ones(len(each.scores), dtype=torch.bool, device=each.scores.device) for each in groups]
    if target <= 0:
        return found
    threshold, below = _threshold(groups, target)
    left = target - below
    for units, kept in zip(reversed(groups), reversed(found), strict=True):
        for place, keys in units.pieces():
            torch.ge(keys, threshold, out=kept[place])
            if left > 0:
                equal = (keys == threshold).nonzero().flatten()
                masked = equal[max(0, len(equal) - math.ceil(left / units.size)) :]
                kept[place][masked] = False
                left -= len(masked) * units.size
    return found


def _threshold(groups: Sequence[_Units], target: int) -> tuple[int, int]:
    """The key with which at least `target` weights are reached, and how many weights lie below it."""
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
        place = int((reached < target).sum())
        below = int(reached[place - 1]) if place else below
        prefix = place - 2 ** (width - 1) if first else prefix << width | place
    return prefix, below


def _in_shape(kept: Tensor, shape: torch.Size) -> Tensor:
    if len(kept) == shape.numel():
        return kept.reshape(shape)
    whole = shape[:1] if len(kept) == shape[0] else shape[:2]
    return kept.reshape(*whole, *[1] * (len(shape) - len(whole))).expand(shape).contiguous()
