"""Latency of a network in the runtime that it is made for, against another's, while it is being decided."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch import Tensor, nn

from tersor.core.progress import NullProgress, ProgressReporter
from tersor.core.target import Target
from tersor.deploy.onnx import export
from tersor.deploy.static_batch import batch_for
from tersor.evaluation.latency import measure_latency
from tersor.evaluation.session import open_session


class RuntimeStopwatch:
    """Exports both networks, and times them in turns at batch size 1.

    Both run in the precision that the runtime chooses, so that what they differ in is their shape.

    Args:
        watch: told of every ratio.
        seconds: no more rounds after that, as for `measure_latency`.
    """

    def __init__(self, watch: ProgressReporter | None = None, *, seconds: float = 4.0) -> None:
        self.watch = watch or NullProgress()
        self.seconds = seconds

    def against(self, original: nn.Module, example: Tensor, target: Target) -> Callable[[nn.Module], float]:
        """A function: network -> its latency as a fraction of `original`'s.

        Raises:
            InputError: a network cannot be exported, or the runtime is not installed or cannot run it.
        """
        folder = TemporaryDirectory()
        image = np.ascontiguousarray(example[:1].cpu().float().numpy())

        def written(network: nn.Module, name: str) -> Path:
            return export(network, example, Path(folder.name) / name, batch=batch_for(network, target))

        first = written(original, "original.onnx")

        def ratio(network: nn.Module) -> float:
            files = {"original": first, "network": written(network, "network.onnx")}
            sessions = {name: partial(open_session, file, target.runtime) for name, file in files.items()}
            timings = measure_latency(sessions, image, [1], seconds=self.seconds)
            found = timings.ratio("network", "original", 1)
            milliseconds = timings.spread("network", 1).median
            self.watch.say(
                f"{milliseconds:.2f} ms at batch 1 in {target.runtime}, {found.value:.3f} of the original's "
                f"({found.low:.3f} to {found.high:.3f})"
            )
            return found.value

        return ratio
