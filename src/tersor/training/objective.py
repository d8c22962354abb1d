"""The training objective: a batch -> named losses.

The training loop calls the Objective, and DDP or `torch.compile` wraps it: there is one forward call and one backward
call a batch, however often the model runs inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tersor.core.errors import InputError
from tersor.core.user_code import user_code
from tersor.data.batch import Batch, as_batch
from tersor.graph.feature_extraction import FeatureExtractor
from tersor.tasks import name_of
from tersor.tasks.classification import Classification
from tersor.tasks.network_outputs import described, in_float32
from tersor.tasks.task import Task, loss_of

LABELS = "labels"
"""Name of the task's loss with the targets."""


@dataclass(frozen=True)
class ForwardContext:
    """How the objective runs the student, for terms that compute something costly or run the student again.

    Attributes:
        model: the student.
        autocast: data type of its forward pass, or None for the model's own.
        task: the task of the networks.
    """

    model: nn.Module | None = None
    autocast: torch.dtype | None = None
    task: Task = field(default_factory=Classification)

    def targets(self, batch: Batch, teacher: Outputs | None) -> Any:
        """The targets of a batch: those of the data, or the teacher's outputs if the task takes these as targets."""
        if self.task.from_original:
            return None if teacher is None else teacher.outputs
        return batch.targets

    def autocasting(self, batch: Batch) -> torch.autocast:
        """Autocast as in the networks' forward pass."""
        return torch.autocast(batch.images.device.type, self.autocast, enabled=self.autocast is not None)


class _LayerOutputs(dict[str, Tensor]):
    """Outputs of layers by path; a path that was not requested is an InputError."""

    def __missing__(self, path: str) -> Tensor:
        raise InputError(
            f"the output of layer '{path}' was not requested; requested: {', '.join(self) or 'none'}. Pass "
            "layers=[(path in the student, path in the teacher)] to Attachment and, in your own loop, "
            "layers=attached.layers to Objective."
        )


@dataclass(frozen=True)
class Outputs:
    """Outputs of a network for one batch, in float32.

    Attributes:
        outputs: what the network returned: a tensor, or tensors in any container.
        layers: outputs of the layers that the terms need, by path.
        context: how the network was run, and for which task.
    """

    outputs: Any
    layers: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    context: ForwardContext = field(default_factory=ForwardContext)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _LayerOutputs(self.layers))

    @property
    def logits(self) -> Tensor:
        """Logits (N, classes, ...).

        Raises:
            InputError: the task has none; a method that needs them checks this earlier, in `attach`.
        """
        logits = self.context.task.logits(self.outputs)
        if logits is None:
            raise InputError(
                f"the network returns a {type(self.outputs).__name__}, which has no logits for "
                f"the task {name_of(self.context.task)}. Choose a method that compares the outputs of layers."
            )
        return logits


class LossTerm(nn.Module):
    """A scalar loss for the student, logged under its `name`.

    `forward(batch, student, teacher)` returns the weighted loss, a scalar tensor. Its inputs are in float32. Costly
    computations may run under `student.context.autocasting(batch)`, but the loss itself must be computed in float32.

    Attributes:
        name: name of the loss; not empty, and not "labels".
        of_method: name of the method in a recipe, for error messages; set by `chain`.
        had_teacher: whether there was a teacher in `attach`, for error messages; set by `chain`.
    """

    name: str = ""
    of_method: str = ""
    had_teacher: bool = False

    def forward(self, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
        """The weighted loss of one batch."""
        raise NotImplementedError


class Objective(nn.Module):
    """Student, teacher and loss terms: `forward(batch)` returns the named losses, whose sum is minimized.

    Each loss is multiplied by its weight: "labels" is the task's loss times `label_weight`.

    Args:
        model: the student.
        terms: the methods' losses.
        teacher: the network that the terms compare with; always in eval mode, without gradients.
        label_weight: weight of the task's loss (the cross entropy with the labels); 0 ignores the targets.
        layers: pairs of paths, of the student and of the teacher, whose outputs the terms need.
        task: gives the loss for the targets; classification by default.
        autocast: data type in which the networks run (bfloat16), or None for the model's own.

    Attributes:
        teacher_cache: returns cached teacher outputs for a batch, instead of running the teacher.

    Raises:
        InputError: a term does not call `super().__init__()`, or its name cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        terms: Iterable[LossTerm] = (),
        teacher: nn.Module | None = None,
        *,
        label_weight: float = 1.0,
        layers: Iterable[tuple[str, str]] = (),
        task: Task | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        pairs, terms = list(layers), list(terms)
        check_terms(terms)
        self._student_features = FeatureExtractor(model, [path for path, _ in pairs])
        self._teacher_features = None if teacher is None else FeatureExtractor(teacher, [path for _, path in pairs])
        self.terms = nn.ModuleList(terms)
        self.teacher = teacher
        self.label_weight = label_weight
        self.context = ForwardContext(model, autocast, task or Classification())
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

    def forward(self, batch: Batch | tuple[Any, Any]) -> dict[str, Tensor]:
        """The losses of one batch, or of a pair (images, targets), by name, each a scalar in float32.

        Raises:
            InputError: the outputs do not fit the task, there is no loss, a user-defined loss fails, or a loss that is
                not 0 has no gradient.
        """
        task, batch = self.context.task, as_batch(batch)
        with self.context.autocasting(batch):
            outputs, features = self._student_features(*task.inputs(batch, training=self.model.training))
        student = Outputs(in_float32(outputs), {path: value.float() for path, value in features.items()}, self.context)
        teacher = None
        if self.teacher is not None and (len(self.terms) or (task.from_original and self.label_weight)):
            teacher = (self.teacher_cache or self.teacher_forward)(batch)
        targets = self.context.targets(batch, teacher)
        losses: dict[str, Tensor] = {}
        if self.label_weight and targets is not None:
            losses[LABELS] = self.label_weight * loss_of(task, student.outputs, targets)
        for term in self.terms:
            assert isinstance(term, LossTerm)
            value = _value(term, batch, student, teacher)
            losses[term.name] = losses.get(term.name, 0) + value  # a method may come twice
        if not losses:
            raise InputError(
                "no loss: the images have no labels, and no method adds a loss. Pass labeled images, or add a method "
                "with a loss."
            )
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.model.parameters()):
            terms = [term for term in self.terms if isinstance(term, LossTerm)]
            _require_gradients(losses, student, {term.name: _named(term) for term in terms})
        return losses

    def teacher_forward(self, batch: Batch) -> Outputs:
        """The teacher's outputs for a batch, in float32 and without gradients."""
        assert self._teacher_features is not None
        with torch.inference_mode(), self.context.autocasting(batch):
            returned = self._teacher_features(*self.context.task.inputs(batch, training=False))
        outputs, features = tree_map(_float32_copy, returned)
        return Outputs(outputs, features, self.context)


def without_teacher(method: str) -> str:
    """The remedy if a user-defined method, or the Objective (empty `method`), has no teacher."""
    if not method:
        return "There is no teacher. Pass teacher=... to Objective."
    return (
        "There is no teacher. Write one in the recipe, and set needs_teacher: ClassVar[bool] = True in class "
        f"{method.rpartition(':')[2]}, so that a recipe without one is refused."
    )


def check_terms(terms: Sequence[object], owner: str = "") -> None:
    """Check the form and the names of loss terms. Terms of one class may share a name: their losses are added.

    Args:
        terms: the terms of one method, or of several.
        owner: first words of the error message.

    Raises:
        InputError: an object is not a LossTerm or does not call `super().__init__()`, or a name cannot be used.
    """
    classes: dict[str, str] = {}
    for term in terms:
        cls = type(term).__name__
        if not isinstance(term, LossTerm):
            raise InputError(
                f"{owner}one of the terms is of type {cls}. Write a class derived from "
                "tersor.training.objective.LossTerm with a `name` and a method forward(batch, student, teacher)."
            )
        if "_modules" not in vars(term):
            raise InputError(f"{owner}{without_init(term)}")
        if not term.name or term.name == LABELS:
            raise InputError(
                f"{owner}the loss {cls} has the name '{term.name}'. Write `name` in the class: not empty, and not "
                f"'{LABELS}', which is the name of the task's loss."
            )
        other = classes.setdefault(term.name, cls)
        if other != cls:
            raise InputError(
                f"{owner}the losses {other} and {cls} have the same name '{term.name}'. Write another `name` in one of "
                "them."
            )


def without_init(instance: object) -> str:
    """The remedy if a user-defined class does not initialize its base class."""
    return f"{type(instance).__name__}.__init__ does not initialize its base class: call super().__init__() first."


def _require_gradients(losses: Mapping[str, Tensor], student: Outputs, named: Mapping[str, str]) -> None:
    """Refuse a loss without gradient, unless it is 0 now, or may be the loss of a layer that is frozen."""
    frozen = not all(value.requires_grad for value in student.layers.values())
    if frozen and any(loss.requires_grad for loss in losses.values()):
        return
    for name, loss in losses.items():
        if not loss.requires_grad and bool(loss):
            raise InputError(
                f"{named.get(name, f'the loss {name}')} has no gradient with respect to the network's weights. Compute "
                "it from the student's outputs or Parameters, without detach(), item(), numpy() or no_grad()."
            )


def _named(term: LossTerm) -> str:
    return f"the loss {term.name}" + (f" of method '{term.of_method}'" if term.of_method else "")


def _value(term: LossTerm, batch: Batch, student: Outputs, teacher: Outputs | None) -> Tensor:
    name = _named(term)
    hint = without_teacher("" if term.had_teacher else term.of_method) if teacher is None else ""
    try:
        with user_code(name, term, if_none=hint):
            value: object = term(batch, student, teacher)
    except AssertionError as error:  # of a term of tersor
        if teacher is not None:
            raise
        raise InputError(f"{name} needs a teacher. {hint}") from error
    if not isinstance(value, Tensor) or value.ndim:
        raise InputError(f"{name} returned {described(value)}. Return a scalar tensor.")
    return value


def _float32_copy(leaf: Any) -> Any:
    """A copy made outside inference mode, which may be saved for backward; floats in float32."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.to(torch.float32, copy=True) if leaf.is_floating_point() else leaf.clone()
