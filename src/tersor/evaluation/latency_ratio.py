"""The latency of a network relative to another network, measured in the target runtime."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from tersor.core.progress import NO_PROGRESS, ProgressReporter
from tersor.core.target import Target
from tersor.data.network_inputs import NetworkInput
from tersor.deploy.onnx import export
from tersor.deploy.static_batch import batch_for
from tersor.evaluation.latency import measure_latency
from tersor.evaluation.scoring import arrays_of
from tersor.evaluation.session import open_session


def latency_ratio(
    original: nn.Module,
    example: NetworkInput,
    target: Target,
    *,
    seconds: float = 4.0,
    progress: ProgressReporter = NO_PROGRESS,
) -> Callable[[nn.Module], float]:
    """Export a network, to time others against it in interleaved rounds at batch size 1.

    Both run at the runtime's default precision, so that only their shapes differ.

    Args:
        original: the network that others are compared with, as it is now.
        example: one image (1, C, H, W), normalized as for the networks.
        target: the runtime.
        seconds: time limit of the rounds, as for `measure_latency`.
        progress: reports each ratio in one line.

    Returns:
        A function of a network: its latency divided by that of `original`.

    Raises:
        InputError: a network cannot be exported, or the runtime is not installed or cannot run it.
    """
    folder = TemporaryDirectory()  # deleted with the returned function
    image = arrays_of(example[:1].float())

    def exported(network: nn.Module, name: str) -> Path:
        return export(network, example, Path(folder.name) / name, batch=batch_for(network, target))

    original_file = exported(original, "original.onnx")

    def ratio(network: nn.Module) -> float:
        files = {"original": original_file, "network": exported(network, "network.onnx")}
        sessions = {name: partial(open_session, file, target.runtime) for name, file in files.items()}
        timings = measure_latency(sessions, image, [1], seconds=seconds)
        measured = timings.ratio("network", "original", 1)
        progress.say(
            f"{timings.spread('network', 1).median:.2f} ms at batch 1 in {target.runtime}, {measured.value:.3f} times "
            f"the original's ({measured.low:.3f} to {measured.high:.3f})"
        )
        return measured.value

    return ratio
