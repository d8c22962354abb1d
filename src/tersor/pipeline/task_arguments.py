"""The task of the Python functions, checked against the networks and the loader before any work starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor import tasks
from tersor.core.errors import InputError
from tersor.data.batch import Batch, images_of
from tersor.data.batch_errors import labels_error
from tersor.data.loader import targets_in, unchecked_labels
from tersor.data.network_inputs import NetworkInput
from tersor.deploy.outputs import LOGITS
from tersor.evaluation.file_inputs import FileArrays
from tersor.evaluation.scoring import file_outputs, joined
from tersor.evaluation.session import Session
from tersor.graph.eval_mode import check_forward, evaluating
from tersor.tasks.classification import Classification
from tersor.tasks.distance import Distance
from tersor.tasks.functions import FromFunctions
from tersor.tasks.network_outputs import described, floats_of_both, in_float32
from tersor.tasks.segmentation import Segmentation
from tersor.tasks.task import Task

Loss = Callable[[Any, Any], Tensor]


def task_of(task: str | Task | None, loss: Loss | None = None, metric: Any = None) -> Task | None:
    """The task that the arguments describe; None without arguments.

    Args:
        task: its name, an instance, or None.
        loss: (outputs, targets) -> scalar tensor.
        metric: (outputs, targets) -> number, or a torchmetrics Metric.

    Raises:
        InputError: one of them cannot be used.
    """
    for name, function in (("loss", loss), ("metric", metric)):
        if isinstance(function, type):
            raise InputError(
                f"{name} is the class {function.__name__}. Pass a function of (outputs, targets), or an instance of "
                "the class."
            )
        if function is not None and not callable(function):
            raise InputError(f"{name} is of type {type(function).__name__}. Pass a function of (outputs, targets).")
    if task is None and loss is None and metric is None:
        return None
    base = Distance() if task is None else tasks.build(task)
    return base if loss is None and metric is None else FromFunctions(base, loss, metric)


def task_of_both(
    task: Task | None, student: nn.Module, teacher: nn.Module, images: NetworkInput
) -> tuple[Task, int | None]:
    """The task of student and teacher, and their number of classes if it is classification.

    Without a task, two networks that return logits (N, classes) are classifiers; all others are compared by distance.

    Raises:
        InputError: a forward pass fails, or the outputs of the two do not match each other or the task.
    """
    outputs: list[Any] = []
    for name, network in (("the student", student), ("the teacher", teacher)):
        with evaluating(network):
            outputs.append(in_float32(check_forward(name, network, images)))
    if task is None:
        classifiers = any(isinstance(each, Tensor) and each.ndim == 2 for each in outputs)
        task = Classification() if classifiers else Distance()
    if not isinstance(task, Classification):
        for each in outputs:
            task.predictions(each)
        classes = [each.shape[1] for each in map(task.logits, outputs) if each is not None and each.ndim > 1]
        if len(set(classes)) > 1:
            raise InputError(
                f"the student returns logits of {classes[0]} classes, the teacher of {classes[1]}. Both must have the "
                "same classes."
            )
        if task.from_original:
            floats_of_both(*outputs)
        return task, None
    logits = [task.logits(each) for each in outputs]
    shapes = [() if each is None else each.shape for each in logits]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2:
        raise InputError(
            f"for two images the student returns {described(outputs[0])}, the teacher {described(outputs[1])}. Both "
            "must return one tensor of logits (2, classes), with the same classes."
        )
    if shapes[0][1] < 2:
        raise InputError(
            "student and teacher return one logit for each image, and distillation needs a distribution over classes. "
            "Give both networks two logits, one for each class."
        )
    return task, int(shapes[0][1])


def labelled(batches: Iterable[Any], classes: int, most: int) -> Iterator[Batch]:
    """The first `most` batches, with labels where those are class indices."""
    for batch in islice(batches, most):
        images, labels = images_of(batch), unchecked_labels(batch)
        usable = labels is not None and labels_error(labels, len(images), classes) is None
        yield Batch(images, labels.long() if labels is not None and usable else None)


def check_targets(task: Task, network: nn.Module, batches: Iterable[Any], images: int) -> None:
    """Check the targets of the first `images` images.

    Raises:
        InputError: they are missing or do not fit the outputs of the network.
    """
    seen: list[tuple[NetworkInput, Any]] = []
    for batch in batches:
        seen.append((images_of(batch), targets_in(batch)))
        if sum(len(each) for each, _ in seen) >= images:
            break
    outputs = check_forward("the network", network, seen[0][0])
    if not isinstance(task, Classification):
        if not task.from_original and any(targets is None for _, targets in seen):
            raise InputError(
                "importance='taylor' needs gradients of the loss on the labels, and the images have no labels. Pass "
                "batches of images and labels, or importance='magnitude'."
            )
        return
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 2:
        raise InputError(
            f"for two images the network returns {described(outputs)}; the cross entropy needs logits (2, classes). "
            "Pass importance='magnitude', or return only the logits, one for each class."
        )
    all_labels(seen, outputs.shape[1])


def all_labels(batches: Iterable[tuple[NetworkInput, Any]], classes: int) -> Tensor | None:
    """The labels (N,) of all batches; None if a batch has no labels.

    Raises:
        InputError: they are not indices of these classes.
    """
    found: list[Tensor] = []
    least: int | None = None
    for images, labels in batches:
        if not isinstance(labels, Tensor):
            return None
        error = labels_error(labels, len(images), classes, least)
        if error is not None:
            raise error
        if len(labels):
            least = min(int(labels.min()), int(labels.min()) if least is None else least)
        found.append(labels.cpu())
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


def task_of_files(task: Task | None, sessions: Mapping[str, Session], images: Mapping[str, FileArrays]) -> Task:
    """The task of files whose outputs can be compared: without one, classification if there are logits (N, classes).

    `images` are the same for all, in the input format of each file.

    Raises:
        InputError: the files differ in their outputs, or one returns NaN.
    """
    outputs = {name: file_outputs(session, images[name]) for name, session in sessions.items()}
    task = task or (Classification() if all(map(_are_logits, outputs.values())) else Distance())
    if isinstance(task, Classification):
        _check_same_logits(task, outputs)
    first, *others = outputs.values()
    if task.from_original:
        for each in others:
            floats_of_both(each, first)
    return task


def targets_for(task: Task, batches: Sequence[tuple[NetworkInput, Any]], outputs: Tensor | Any) -> Any:
    """The targets of all batches as one; None if a batch has none.

    Raises:
        InputError: they do not fit the task.
    """
    if isinstance(task, Classification):
        logits = task.logits(outputs)
        return all_labels(batches, max(2, 2 if logits is None else logits.shape[1]))
    found = [targets for _, targets in batches]
    if isinstance(task, Segmentation):
        logits = task.logits(outputs)
        for (images, _), targets in zip(batches, found, strict=True):
            if targets is not None and logits is not None:
                task.check_masks(targets, len(images), logits.shape[1])
    return joined(found)


def _are_logits(outputs: Any) -> bool:
    """Whether outputs without a task are logits (N, classes): among several with names, only `logits` is."""
    if isinstance(outputs, Mapping) and len(outputs) > 1 and LOGITS not in outputs:
        return False
    logits = Classification().logits(outputs)
    return logits is not None and logits.ndim == 2


def _check_same_logits(task: Task, outputs: Mapping[str, Any]) -> None:
    logits = {name: task.logits(each) for name, each in outputs.items()}
    shapes = {name: () if each is None else tuple(each.shape[1:]) for name, each in logits.items()}
    if len(set(shapes.values())) > 1:
        of_each = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in shapes.items())
        raise InputError(
            f"the files differ in the number of logits per image: {of_each}. Compare files of the same network."
        )
    for name, each in logits.items():
        if each is not None and np.isnan(each.numpy()).any():
            raise InputError(
                f"{name} returns NaN for the first images, so it has no valid predictions. Check the weights, and the "
                "values and normalization of the images."
            )
