"""One training run of a candidate, in its stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from tersor.evaluation.results import StageRecord
from tersor.recipe import Stage
from tersor.search.candidate import Candidate
from tersor.search.workbench import Workbench

QUANTIZED_SHARE = 0.25
"""Share of a training run that is quantization-aware, if it ends with such a stage."""


@dataclass(frozen=True)
class Training:
    """One training run of a candidate.

    Attributes:
        trained: the stages of its earlier training runs, which come from their checkpoints.
        stages: the stages of this run.
        seconds: time for all of `stages`.
    """

    trained: Sequence[Stage]
    stages: Sequence[Stage]
    seconds: float


def train(
    bench: Workbench, candidate: Candidate, training: Training, now: Callable[[], float] = time.monotonic
) -> tuple[nn.Module, list[StageRecord]]:
    """Train a candidate; return the network, and a record for each stage of this run.

    Raises:
        InputError: the training diverged, or a stage cannot be attached.
    """
    results: list[tuple[nn.Module, StageRecord]] = []
    left = training.seconds
    for number in range(1, len(training.stages) + 1):
        start = now()
        seconds = left * (1 - QUANTIZED_SHARE * (number < len(training.stages)))
        results.append(bench.train(candidate, (*training.trained, *training.stages[:number]), seconds))
        left -= min(seconds, now() - start)  # a stage that ended before an interruption takes no time
    return results[-1][0], [record for _, record in results]
