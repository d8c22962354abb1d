"""What is asked of the network: a batch goes in, named losses come out.

The Objective is the one thing that a loop calls, and the one that DDP or `torch.compile` wraps: however
often the model runs inside, there is one forward call and one backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Self
from weakref import ReferenceType, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.data.batch import Batch
from tersor.graph.feature_extraction import FeatureExtractor


@dataclass(frozen=True)
class Outputs:
    """What a network answered: `logits` (N, classes); `layers`, what those gave that a term asked for, by path."""

    logits: Tensor
    layers: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


class LossTerm(nn.Module):
    """A scalar that the student should make small, logged under its `name`.

    `forward(batch, student, teacher)` returns the weighted loss, a scalar tensor. What it is given is in float32;
    costly work of its own may run under `autocasting(batch)`, but not the loss itself.
    """

    name: str = ""
    _asked_by: ReferenceType[Objective] | None = None

    def forward(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The weighted loss of one batch."""
        raise NotImplementedError

    def join(self, objective: Objective) -> None:
        """Who asks: a term that runs the network again runs the objective's, as it does."""
        self._asked_by = ref(objective)

    @property
    def objective(self) -> Objective | None:
        """Who asks, while it is there."""
        return self._asked_by() if self._asked_by else None

    def autocasting(self, batch: Batch) -> AbstractContextManager[object]:
        """The precision in which the objective's networks run, for those of the term."""
        return nullcontext() if self.objective is None else self.objective.autocasting(batch)


class Objective(nn.Module):
    """Model, teacher and terms: `forward(batch)` gives the named losses, whose sum is to be minimised.

    Args:
        model: the network that learns.
        terms: what the methods ask.
        teacher: the network that the terms compare with; always in eval, never given a gradient.
        label_weight: weight of the cross entropy with the labels; 0 leaves the labels alone.
        layers: pairs of paths, of the student and of the teacher, whose outputs the terms need.
        label_smoothing: part of the label's probability that is spread over all classes.
        autocast: data type in which the networks run (bfloat16), or None for the model's own.

    Attributes:
        answers: what gives the teacher's outputs in its place, where they are kept from before.
    """

    def __init__(
        self,
        model: nn.Module,
        terms: Iterable[LossTerm] = (),
        teacher: nn.Module | None = None,
        *,
        label_weight: float = 1.0,
        layers: Iterable[tuple[str, str]] = (),
        label_smoothing: float = 0.0,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        pairs = list(layers)
        self._ask_student = FeatureExtractor(model, [path for path, _ in pairs])
        self._ask = None if teacher is None else FeatureExtractor(teacher, [path for _, path in pairs])
        self.terms = nn.ModuleList(terms)
        self.teacher = teacher
        self.label_weight = label_weight
        self.label_smoothing = label_smoothing
        self.autocast = autocast
        self.answers: Callable[[Batch], Outputs] | None = None
        if teacher is not None:
            teacher.requires_grad_(requires_grad=False)
        for term in self.terms:
            assert isinstance(term, LossTerm)
            term.join(self)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Sets the model's mode; the teacher stays in eval."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of one batch by name, each a scalar in float32.

        Raises:
            InputError: the network does not return logits, or there is no loss.
        """
        with self.autocasting(batch):
            logits, given = self._ask_student(batch.images)
        if not isinstance(logits, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(
                f"in training the network answers with a {type(logits).__name__}, not with logits (N, classes). Build "
                "it without auxiliary heads (aux_logits=False)."
            )
        teacher = None
        if len(self.terms) and self.teacher is not None:
            teacher = (self.answers or self.teacher_forward)(batch)
        student = Outputs(logits.float(), {path: value.float() for path, value in given.items()})
        losses: dict[str, Tensor] = {}
        if self.label_weight and batch.labels is not None:
            losses["labels"] = self.label_weight * F.cross_entropy(
                student.logits, batch.labels, label_smoothing=self.label_smoothing
            )
        for term in self.terms:
            assert isinstance(term, LossTerm)
            losses[term.name] = losses.get(term.name, 0) + term(batch, student, teacher)  # a method may come twice
        if not losses:
            raise InputError("no loss: the images have no labels, and no method adds a loss.")
        return losses

    def teacher_forward(self, batch: Batch) -> Outputs:
        """What the teacher gives for the images of `batch`, in float32 and without a gradient."""
        assert self._ask is not None
        with torch.inference_mode(), self.autocasting(batch):
            logits, given = self._ask(batch.images)
        # a copy outside inference mode may be saved for backward
        logits, *values = (value.to(torch.float32, copy=True) for value in (logits, *given.values()))
        return Outputs(logits, dict(zip(given, values, strict=True)))

    def autocasting(self, batch: Batch) -> torch.autocast:
        """The precision in which the networks run."""
        return torch.autocast(batch.images.device.type, self.autocast, enabled=self.autocast is not None)
