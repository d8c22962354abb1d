"""How many blocks of channels go, so that a fraction of a cost stays that was asked for."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

_MISCOUNTED = 0.005
"""Of a fraction that stays; more is not rounding."""

_PROBES = 7
_CLOSE = 0.02
"""Fractions of a latency that differ by less are not told apart."""


def meet_cost(stays: Sequence[float], really: Callable[[int], float], keep: float) -> tuple[int, float]:
    """The fewest blocks without which at most `keep` stays, if any number will do, and what stays then.

    Args:
        stays: of a cost without none, the first, the first two ... blocks, as counted from the widths of layers. That
            misses what is computed between them, as in attention.
        really: the same, asked of the network without so many blocks: it decides where the count is off.
        keep: the fraction.
    """
    numbers = range(len(stays))
    blocks = min(bisect_left(numbers, x=True, key=lambda number: stays[number] <= keep), numbers[-1])
    if abs(really(blocks) - stays[blocks]) > _MISCOUNTED:
        blocks = min(bisect_left(numbers, x=True, key=lambda number: really(number) <= keep), numbers[-1])
    return blocks, really(blocks)


def meet_latency(stays: Sequence[float], ratio: Callable[[int], float], keep: float) -> tuple[int, float]:
    """Blocks without which `ratio` is at most `keep`, if any number will do, and nearly that; what it is then.

    Bisection on the fraction of the MACs that stays, in which a latency is more even than in blocks.

    Args:
        stays: of the MACs, without none, the first, the first two ... blocks.
        ratio: the latency without so many blocks, as a fraction.
        keep: the fraction.
    """
    slow, fast, found = 0, len(stays) - 1, 0.0
    for _ in range(_PROBES):
        middle = (stays[slow] + stays[fast]) / 2
        blocks = min(bisect_left(range(len(stays)), -middle, key=lambda number: -stays[number]), fast - 1)
        if blocks <= slow:
            break
        measured = ratio(blocks)
        if measured > keep:
            slow = blocks
            continue
        fast, found = blocks, measured
        if measured > keep - _CLOSE:
            break
    return fast, found or ratio(fast)
