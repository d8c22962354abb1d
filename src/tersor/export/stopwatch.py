"""Latency of a network in the runtime that it is made for, against another's, while it is being decided."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch import Tensor, nn

from tersor.core.target import Target
from tersor.core.watch import Unwatched, Watch
from tersor.export.bench import latency
from tersor.export.onnx import export
from tersor.export.runtime import Session, open_session
from tersor.export.static_batch import batch_for


class RuntimeStopwatch:
    """Exports both networks, and times them in turns at batch size 1: a ratio is the median of those of one round.

    Both run in the precision that the runtime takes by itself, so that what they differ in is their shape.

    Args:
        watch: told of every ratio.
        rounds: turns of each network.
        seconds: no more rounds after that, once there were five.
    """

    def __init__(self, watch: Watch | None = None, *, rounds: int = 60, seconds: float = 4.0) -> None:
        self.watch = watch or Unwatched()
        self.rounds = rounds
        self.seconds = seconds

    def against(self, original: nn.Module, example: Tensor, target: Target) -> Callable[[nn.Module], float]:
        """A function: network -> its latency as a fraction of `original`'s.

        Raises:
            InputError: a network cannot be exported, or the runtime is not installed or cannot run it.
        """
        first = _opened(original, example, target)
        image = np.ascontiguousarray(example[:1].cpu().float().numpy())

        def ratio(network: nn.Module) -> float:
            sessions = {"original": first, "network": _opened(network, example, target)}
            timings = latency(sessions, image, [1], rounds=self.rounds, seconds=self.seconds)
            found = timings.paired_ratio("network", "original", 1)
            milliseconds = timings.spread("network", 1).median
            self.watch.say(
                f"{milliseconds:.2f} ms at batch 1 in {target.runtime}, {found.median:.3f} of the original's "
                f"({found.p10:.3f} to {found.p90:.3f})"
            )
            return found.median

        return ratio


def _opened(network: nn.Module, example: Tensor, target: Target) -> Session:
    with TemporaryDirectory() as folder:
        path = export(network, example, Path(folder) / "network.onnx", batch=batch_for(network, target))
        return open_session(path, target.runtime)
