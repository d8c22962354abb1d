"""Latency for methods that decide by it. Measuring needs a runtime, which lies floors above them: it is handed in.

A class in `methods/` that says `needs_stopwatch` is given one by `chain`. Attaching has to decide the same when a run
goes on, and a measured time is never the same twice: so the stopwatch of a run remembers what it has measured, and
answers the same question again as it did before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from tersor.core.target import Target


class Stopwatch(Protocol):
    """Times networks where they will run."""

    def against(self, original: nn.Module, example: Tensor, target: Target) -> Callable[[nn.Module], float]:
        """A function: network -> its latency as a fraction of `original`'s.

        Args:
            original: what others are timed against, as it is now.
            example: one image (1, C, H, W) as the networks want it: latency is that of batch size 1.
            target: the runtime.
        """
        ...
