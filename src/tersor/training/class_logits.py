"""Logits of any shape (N, classes, ...) as rows, and what a loss on logits needs of the task.

A loss averages over the rows, so that its weight has the same meaning with one row per image and with one row per
pixel.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.data.batch import OnePass
from tersor.graph.eval_mode import evaluating
from tersor.graph.forward_call import run
from tersor.tasks import name_of
from tersor.tasks.calibration_batch import read_batch
from tersor.tasks.network_outputs import described
from tersor.tasks.task import Task
from tersor.training.context import AttachContext
from tersor.training.objective import Outputs

_LAYER_METHODS = "fitnet, attention_transfer, factor_transfer, crd or reviewkd, which compare the outputs of layers"


def by_position(logits: Tensor) -> Tensor:
    """Logits (N, classes, ...) as (rows, classes), one row for each image and position; (N, classes) unchanged."""
    return logits if logits.ndim == 2 else logits.movedim(1, -1).flatten(0, -2)


def distributions(logits: Tensor, task: Task) -> Tensor:
    """Logits (N, classes, ...) as (rows, classes) whose softmax is a distribution.

    With independent classes, or a single logit, there is one row (2,) for each image, position and class: the logits
    that the class is present and that it is absent.
    """
    rows = by_position(logits)
    if not task.independent_classes and rows.shape[1] > 1:
        return rows
    return torch.stack([rows, torch.zeros_like(rows)], -1).flatten(0, 1)


def rows_with_class(student: Tensor, teacher: Tensor, targets: Any, task: Task) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of student and teacher logits whose class is known, each (rows, classes), and the classes (rows,).

    Masks of another size take the nearest pixel. Positions with the task's `ignore_index` are left out.

    Raises:
        InputError: the targets are not class indices for each position.
    """
    classes = _class_numbers(targets, student)
    rows = by_position(student), by_position(teacher), classes.flatten()
    ignored = getattr(task, "ignore_index", None)
    if ignored is None:
        return rows
    known = rows[2] != ignored
    return rows[0][known], rows[1][known], rows[2][known]


def require_logits(context: AttachContext, method: str, instead: str = _LAYER_METHODS, **networks: nn.Module) -> None:
    """Check that the task has logits. If there are data, check on two images that all networks have the same shape.

    Args:
        context: the task, and the data.
        method: the method's name, for error messages.
        instead: what to write for a task without logits, for error messages.
        networks: the networks, by their names in error messages.

    Raises:
        InputError: the task has no logits, or the shapes differ.
    """
    task = context.task
    if type(task).logits is Task.logits:
        raise _no_logits(method, task, "", instead)
    first = _first_batch(context)
    if first is None:
        return
    images = read_batch(first, task, 2).images
    shapes = dict[str, tuple[int, ...]]()
    for name, network in networks.items():
        with evaluating(network), torch.no_grad(), torch.random.fork_rng(devices=[]):
            parameter = next(network.parameters(), None)
            outputs = run(network, images if parameter is None else images.to(parameter))
        logits = task.logits(outputs)
        if logits is None or logits.ndim < 2:
            raise _no_logits(method, task, f" in the outputs of the {name} ({described(outputs)})", instead)
        shapes[name] = tuple(logits.shape)
    for one, other in pairwise(shapes.items()):
        _require_equal(method, one, other, instead)


def logits_of_both(student: Outputs, teacher: Outputs | None, method: str) -> tuple[Tensor, Tensor]:
    """The logits (N, classes, ...) of student and teacher, which a loss compares.

    In the user's own loop `require_logits` may have had no data to check them.

    Raises:
        InputError: their shapes differ.
    """
    assert teacher is not None
    ours, theirs = student.logits, teacher.logits
    _require_equal(method, ("student", tuple(ours.shape)), ("teacher", tuple(theirs.shape)))
    return ours, theirs


def require_class_targets(context: AttachContext, method: str) -> None:
    """Check that each position has one class, by the task and by the first targets of the data.

    Raises:
        InputError: the classes are independent, the task has no targets, or they are not class indices.
    """
    task, first = context.task, _first_batch(context)
    if task.independent_classes or task.from_original:
        kind = "any number of classes for each image" if task.independent_classes else "no classes as targets"
        raise InputError(
            f"{method} needs one target class, and the task {name_of(task)} has {kind}. Write soft_targets or dist."
        )
    if first is None:
        return
    batch = read_batch(first, task, 2)
    if batch.targets is not None and not _is_class_numbers(batch.targets, len(batch.images)):
        raise _no_class_numbers(batch.targets, method)


def _first_batch(context: AttachContext) -> Any:
    data = context.data
    if data is None:
        return None
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed
        return next(iter(data.ahead() if isinstance(data, OnePass) else data), None)


def _require_equal(
    method: str, one: tuple[str, tuple[int, ...]], other: tuple[str, tuple[int, ...]], instead: str = _LAYER_METHODS
) -> None:
    """Compare the logits' shapes of two networks, each with its name."""
    if one[1] != other[1]:
        raise InputError(
            f"{method} compares logits of equal shape, but those of the {one[0]} have the shape {one[1]} and those of "
            f"the {other[0]} {other[1]}. Use networks with the same classes and the same output size, or {instead}."
        )


def _no_logits(method: str, task: Task, where: str, instead: str) -> InputError:
    return InputError(
        f"{method} compares logits (N, classes, ...), and the task {name_of(task)} has none{where}. Write {instead}."
    )


def _is_class_numbers(targets: Any, images: int) -> bool:
    return (
        isinstance(targets, Tensor)
        and targets.ndim > 0
        and len(targets) == images
        and not targets.is_floating_point()
        and targets.dtype != torch.bool
    )


def _class_numbers(targets: Any, logits: Tensor) -> Tensor:
    """Integers of the shape (N, ...) of the positions of logits (N, classes, ...)."""
    positions = (len(logits), *logits.shape[2:])
    if not _is_class_numbers(targets, len(logits)) or targets.ndim != len(positions):
        raise _no_class_numbers(targets)
    if targets.shape == positions:
        return targets.long()
    if targets.ndim != 3:
        raise _no_class_numbers(targets)
    return F.interpolate(targets[:, None].double(), positions[1:], mode="nearest")[:, 0].long()


def _no_class_numbers(targets: Any, method: str = "dkd") -> InputError:
    return InputError(
        f"{method} needs one class index for each position: integers of shape (N,) for logits (N, classes), or "
        f"(N, H, W) for logits (N, classes, H, W). Given targets: {described(targets)}. Write soft_targets or dist, "
        "which need no class."
    )
