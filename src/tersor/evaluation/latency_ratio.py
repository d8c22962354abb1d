"""The latency of a network relative to another network, measured in the target runtime."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torch import Tensor, nn

from tersor.core.progress import NO_PROGRESS, ProgressReporter
from tersor.core.target import Target
from tersor.deploy.onnx import export
from tersor.deploy.static_batch import batch_for
from tersor.evaluation.latency import measure_latency
from tersor.evaluation.session import open_session


def latency_ratio(
    network: nn.Module,
    original: nn.Module,
    example: Tensor,
    target: Target,
    *,
    seconds: float = 4.0,
    progress: ProgressReporter = NO_PROGRESS,
) -> float:
    """Export both networks and time them in interleaved rounds at batch size 1, at the runtime's default precision.

    Args:
        network: the network to measure.
        original: the network that it is compared with.
        example: one image (1, C, H, W), normalized as for the networks.
        target: the runtime.
        seconds: time limit of the rounds, as for `measure_latency`.
        progress: reports the ratio in one line.

    Returns:
        The latency of `network` divided by that of `original`.

    Raises:
        InputError: a network cannot be exported, or the runtime is not installed or cannot run it.
    """
    image = np.ascontiguousarray(example[:1].cpu().float().numpy())
    with TemporaryDirectory() as folder:
        files = {
            name: export(each, example, Path(folder) / f"{name}.onnx", batch=batch_for(each, target))
            for name, each in (("original", original), ("network", network))
        }
        sessions = {name: partial(open_session, file, target.runtime) for name, file in files.items()}
        timings = measure_latency(sessions, image, [1], seconds=seconds)
    ratio = timings.ratio("network", "original", 1)
    milliseconds = timings.spread("network", 1).median
    progress.say(
        f"{milliseconds:.2f} ms at batch 1 in {target.runtime}, {ratio.value:.3f} of the original's "
        f"({ratio.low:.3f} to {ratio.high:.3f})"
    )
    return ratio.value
