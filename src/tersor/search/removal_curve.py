"""How the drop after training grows with the removed share of the latency.

A ResNet-56 without 9 of its 27 residual branches lost 0.48 points after 440 training steps, and 2.42 after 519 steps
without 15 of them: a power of 3.2 of the removed share of the latency.
"""

from __future__ import annotations

from tersor.search.front import Point

STEEPNESS = 3.0
ERROR = 0.5
"""One standard error of the logarithm of an estimated drop."""
_SHORTEST = 0.1
"""Least training time in seconds that is assumed; the time of a point is rounded to tenths."""


def relative_drop(ms: float, start: Point, full: Point) -> float:
    """The drop of a network after training, divided by that of another one after the same time.

    Args:
        ms: latency of the network in milliseconds, the mean over the batch sizes as in `Point.mean_ms`.
        start: the other network, which is faster than `full`.
        full: the 8-bit original.
    """
    removed, removed_from_start = 1 - ms / full.mean_ms, 1 - start.mean_ms / full.mean_ms
    return (max(0.0, removed) / removed_from_start) ** STEEPNESS


def trained_seconds(point: Point) -> float:
    """The training time of a trained point in seconds, above 0."""
    return max(_SHORTEST, point.seconds)
