"""A user's batch of images and targets, as a task reads it outside of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from tersor.data.batch import Batch, images_of, labels_of
from tersor.data.loader import targets_in
from tersor.tasks.classification import Classification
from tersor.tasks.task import Task


def read_batch(batch: Any, task: Task, count: int | None = None) -> Batch:
    """Return the first `count` images (N, C, H, W) of a batch, and their targets if the task uses them and they exist.

    Args:
        batch: a `Batch`, a tensor, a tuple or list that begins with one, or a mapping.
        task: the task; for classification, only class indices (N,) are targets; a task with `from_original` has none.
        count: number of images; None for all.
    """
    images = images_of(batch)[:count]
    if task.from_original:
        return Batch(images)
    targets = labels_of(batch) if isinstance(task, Classification) else targets_in(batch)
    return Batch(images, first_targets(targets, count))


def first_targets(targets: Any, count: int | None) -> Any:
    """The targets of the first `count` images; tensors and lists are sliced, in any nested container."""
    if isinstance(targets, Tensor | list):
        return cast("Any", targets[:count])
    if isinstance(targets, Mapping):
        return {key: first_targets(each, count) for key, each in cast("Mapping[Any, Any]", targets).items()}
    if isinstance(targets, tuple):
        return tuple(first_targets(each, count) for each in cast("tuple[Any, ...]", targets))
    return targets
