"""The task of a network: its loss, its metric, and when two predictions agree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from inspect import isfunction
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from tersor.core.errors import InputError
from tersor.core.user_code import user_code
from tersor.data.batch import Batch
from tersor.tasks.network_outputs import described, relative_errors

PLAIN_VALUES = ConfigDict(extra="forbid")
"""The pydantic configuration of every task: `@plain_dataclass(frozen=True, config=PLAIN_VALUES)`."""

Pairs = Iterable[tuple[Any, Any]]
"""For each batch: predictions, and the targets."""

_METHODS = {"loss", "inputs", "logits", "predictions", "score", "score_by_class", "agreement"}


class Task:
    """The task of a network. Subclasses set the attributes, and override `loss`, `score` and, if necessary, more.

    `outputs` is whatever the network returned (a tensor, a tuple, a dict), with floats in float32. `targets` is what
    the data holds for a batch of images.

    Attributes:
        metric: name of the metric.
        unit: unit of the metric: "%", or "" for a number without one.
        higher_is_better: whether a higher metric is better.
        boxes: whether the targets are boxes.
        from_original: whether the targets are the outputs of the original network, so that the data needs none.
        independent_classes: whether each logit is a label of its own (sigmoid), not one class of several (softmax).
    """

    metric: ClassVar[str]
    unit: ClassVar[str] = "%"
    higher_is_better: ClassVar[bool] = True
    boxes: ClassVar[bool] = False
    from_original: ClassVar[bool] = False
    independent_classes: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Turn an exception in a user's task into one message with its file and line."""
        super().__init_subclass__()
        if cls.__module__.startswith("tersor."):
            return
        for name in _METHODS & vars(cls).keys():
            setattr(cls, name, _explained(f"{name} of {cls.__name__}", vars(cls)[name]))

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The scalar to minimize, for the outputs in training mode."""
        raise NotImplementedError

    def inputs(self, batch: Batch, *, training: bool) -> tuple[Any, ...]:
        """The arguments of the network's forward."""
        return (batch.images,)

    def logits(self, outputs: Any) -> Tensor | None:
        """Logits (N, classes, ...) that soft targets can soften; None if there are none."""
        return None

    def predictions(self, outputs: Any) -> Any:
        """The predictions to score and compare: a pytree or list on the CPU, with one entry for each image."""
        return tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, outputs)

    def score(self, pairs: Pairs) -> float:
        """The metric over all batches of predictions and targets.

        Raises:
            InputError: there is no image, or the targets do not fit.
        """
        raise NotImplementedError

    def score_by_class(self, pairs: Pairs, classes: int) -> Tensor | None:
        """The metric of each class (classes,), NaN for a class that does not occur; None if it has no classes."""
        return None

    def shown(self, score: float) -> str:
        """A score in words: "71.20 %", or "0.1234" without a unit."""
        return f"{score:.2f} {self.unit}" if self.unit else f"{score:.4g}"

    def agreement(self, predictions: Any, reference: Any) -> Tensor:
        """For each image (N,), float64, how much of the prediction stays the same, from 0 to 1."""
        return (1 - relative_errors(predictions, reference)).clamp(min=0)


def _explained(name: str, member: Any) -> Any:
    """A method, static method, class method or callable object with `user_code` around its call."""
    if isinstance(member, staticmethod | classmethod):
        function: Any = member.__func__
        return type(member)(user_code(name, function)(function))
    called = user_code(name, member)(member)
    return called if isfunction(member) else staticmethod(called)


def loss_of(task: Task, outputs: Any, targets: Any) -> Tensor:
    """The loss of the task.

    Raises:
        InputError: it is not a scalar tensor, or has no gradient where the outputs have one.
    """
    value: object = task.loss(outputs, targets)
    if not isinstance(value, Tensor) or value.ndim:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"the loss returned {described(value)}. Return a tensor without dimensions, such as the mean over the "
            "batch."
        )
    learning = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(outputs))
    if learning and torch.is_grad_enabled() and not value.requires_grad:
        raise InputError("the loss has no gradient. Compute it from the outputs with torch operations.")
    return value


def with_label_smoothing(task: Task, fraction: float) -> Task:
    """The task with this label smoothing, the task itself where `fraction` is 0.

    Raises:
        InputError: the loss of the task has no label smoothing.
    """
    if not fraction:
        return task
    if not is_dataclass(task) or "label_smoothing" not in {each.name for each in fields(task)}:
        raise InputError(
            f"label_smoothing is {fraction}, but the loss of {type(task).__name__} does not support it. Leave "
            "label_smoothing out."
        )
    return replace(task, label_smoothing=fraction)


def no_targets(task: Task) -> InputError:
    """The error for images without targets, where the task needs them."""
    return InputError(
        f"{task.metric} cannot be measured on images without labels. Give labeled images, or the task distance "
        "(`--task distance`, task: distance in a recipe), which compares the outputs with those of the original."
    )


def required(pairs: Pairs, task: Task) -> list[tuple[Any, Any]]:
    """The pairs, at least one, all with targets.

    Raises:
        InputError: there is no image, or a batch has no targets.
    """
    found = list(pairs)
    if any(targets is None for _, targets in found):
        raise no_targets(task)
    if not found:
        raise InputError(f"{task.metric} cannot be measured without images. Give at least one labeled batch.")
    return found


def whole(pairs: list[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """Predictions and targets of all batches as two tensors on the CPU."""
    predictions, targets = zip(*pairs, strict=True)
    return torch.cat(predictions), torch.cat([each.cpu() for each in targets])
