"""The training objective: a batch -> named losses.

The training loop calls the Objective, and DDP or `torch.compile` wraps it: there is one forward call and one backward
call a batch, however often the model runs inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.data.batch import Batch
from tersor.graph.feature_extraction import FeatureExtractor


@dataclass(frozen=True)
class ForwardContext:
    """How the objective runs the student, for terms that compute something costly or run the student again.

    Attributes:
        model: the student.
        autocast: data type of its forward pass, or None for the model's own.
        label_smoothing: label smoothing of the cross entropy.
    """

    model: nn.Module | None = None
    autocast: torch.dtype | None = None
    label_smoothing: float = 0.0

    def autocasting(self, batch: Batch) -> torch.autocast:
        """Autocast as in the networks' forward pass."""
        return torch.autocast(batch.images.device.type, self.autocast, enabled=self.autocast is not None)


@dataclass(frozen=True)
class Outputs:
    """Outputs of a network for one batch, in float32.

    Attributes:
        logits: (N, classes).
        layers: outputs of the layers that the terms need, by path.
        context: how the student was run.
    """

    logits: Tensor
    layers: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    context: ForwardContext = ForwardContext()


class LossTerm(nn.Module):
    """A scalar loss for the student, logged under its `name`.

    `forward(batch, student, teacher)` returns the weighted loss, a scalar tensor. Its inputs are in float32. Costly
    work of its own may run under `student.context.autocasting(batch)`, but not the loss itself.
    """

    name: str = ""

    def forward(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The weighted loss of one batch."""
        raise NotImplementedError


class Objective(nn.Module):
    """Student, teacher and loss terms: `forward(batch)` returns the named losses, whose sum is minimized.

    Args:
        model: the student.
        terms: the methods' losses.
        teacher: the network that the terms compare with; always in eval mode, without gradients.
        label_weight: weight of the cross entropy with the labels; 0 ignores the labels.
        layers: pairs of paths, of the student and of the teacher, whose outputs the terms need.
        label_smoothing: fraction of the label's probability that is spread over all classes.
        autocast: data type in which the networks run (bfloat16), or None for the model's own.

    Attributes:
        teacher_cache: returns cached teacher outputs for a batch, instead of running the teacher.
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
        self._student_features = FeatureExtractor(model, [path for path, _ in pairs])
        self._teacher_features = None if teacher is None else FeatureExtractor(teacher, [path for _, path in pairs])
        self.terms = nn.ModuleList(terms)
        self.teacher = teacher
        self.label_weight = label_weight
        self.context = ForwardContext(model, autocast, label_smoothing)
        self.teacher_cache: Callable[[Batch], Outputs] | None = None
        if teacher is not None:
            teacher.requires_grad_(requires_grad=False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of one batch by name, each a scalar in float32.

        Raises:
            InputError: the network does not return logits, or there is no loss.
        """
        with self.context.autocasting(batch):
            logits, features = self._student_features(batch.images)
        if not isinstance(logits, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(
                f"in training mode the network returns a {type(logits).__name__}, not logits (N, classes). Build it "
                "without auxiliary heads (aux_logits=False)."
            )
        teacher = None
        if len(self.terms) and self.teacher is not None:
            teacher = (self.teacher_cache or self.teacher_forward)(batch)
        student = Outputs(logits.float(), {path: value.float() for path, value in features.items()}, self.context)
        losses: dict[str, Tensor] = {}
        if self.label_weight and batch.labels is not None:
            losses["labels"] = self.label_weight * F.cross_entropy(
                student.logits, batch.labels, label_smoothing=self.context.label_smoothing
            )
        for term in self.terms:
            assert isinstance(term, LossTerm)
            losses[term.name] = losses.get(term.name, 0) + term(batch, student, teacher)  # a method may come twice
        if not losses:
            raise InputError("no loss: the images have no labels, and no method adds a loss.")
        return losses

    def teacher_forward(self, batch: Batch) -> Outputs:
        """The teacher's outputs for a batch, in float32 and without gradients."""
        assert self._teacher_features is not None
        with torch.inference_mode(), self.context.autocasting(batch):
            logits, features = self._teacher_features(batch.images)
        # a copy made outside inference mode may be saved for backward
        logits, *values = (value.to(torch.float32, copy=True) for value in (logits, *features.values()))
        return Outputs(logits, dict(zip(features, values, strict=True)))
