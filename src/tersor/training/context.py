"""Everything a method may use while it is attached to a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tersor.core.errors import InputError
from tersor.core.progress import NullProgress, ProgressReporter
from tersor.core.target import Target
from tersor.data.batch import OnePass
from tersor.data.network_inputs import NetworkInput
from tersor.tasks.classification import Classification
from tersor.tasks.task import Task

LatencyRatio = Callable[[nn.Module, NetworkInput, Target], Callable[[nn.Module], float]]
"""`latency_ratio(original, example, target)(network)`: the latency of a network as a fraction of the original's, both
measured at batch size 1 in the target runtime on the image `example` (1, C, H, W).
"""


def _no_checkpoint(_network: nn.Module) -> None:
    pass


@dataclass(frozen=True)
class AttachContext:
    """Everything around a network that `Method.attach` and `Attachment.begin` may use.

    Attributes:
        data: batches of images for methods that need images: tensors (N, C, H, W), tuples that begin with one, or
            `Batch`es. It is iterated again for every pass; an iterator is enough for a method that needs one pass.
        teacher: the network to learn from.
        task: the task of the network: loss, logits and metric.
        steps: number of optimizer steps that follow.
        steps_per_epoch: optimizer steps of one epoch; None if no training follows, or if the caller has not set it.
        target: runtime and processor that the network is compressed for.
        latency: measures latency, for methods with a latency budget.
        progress: reports the progress of slow work.
        checkpoint: saves the network's state during `begin`, so that an interrupted run resumes there.
    """

    data: Iterable[Any] | None = None
    teacher: nn.Module | None = None
    task: Task = field(default_factory=Classification)
    steps: int = 0
    steps_per_epoch: int | None = None
    target: Target = field(default_factory=Target)
    latency: LatencyRatio | None = None
    progress: ProgressReporter = field(default_factory=NullProgress)
    checkpoint: Callable[[nn.Module], None] = _no_checkpoint

    def __post_init__(self) -> None:
        if isinstance(self.data, Iterator) and not isinstance(self.data, OnePass):
            object.__setattr__(self, "data", OnePass(self.data))


def require_steps(context: AttachContext, method: str) -> int:
    """The number of optimizer steps that follow.

    Raises:
        InputError: there are none.
    """
    if not context.steps:
        raise InputError(
            f"{method} needs training, but there are 0 steps. Write epochs or steps in its stage; in your own loop, "
            "pass AttachContext(steps=...) with the number of optimizer steps that follow."
        )
    return context.steps
