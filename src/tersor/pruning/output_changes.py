"""The change of a network's outputs: of the logits, or without logits of all tensors relative to their size."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tersor.tasks.network_outputs import relative_squared_error, relative_values
from tersor.tasks.task import Task


def compared_values(outputs: Any, task: Task) -> Tensor:
    """Values (N, ...) of a batch; the sum of their squared differences is what `squared_change` returns.

    Raises:
        InputError: the outputs hold no floating-point tensor.
    """
    logits = _centered_logits(outputs, task)
    return relative_values(outputs) if logits is None else logits


def squared_change(outputs: Any, original: Any, task: Task, images: int) -> float:
    """The squared change of the outputs, summed over a batch of `images`.

    Raises:
        InputError: the outputs hold no floating-point tensor, or the two differ in number or shapes.
    """
    changed, before = (_centered_logits(each, task) for each in (outputs, original))
    if changed is None or before is None:
        return images * float(relative_squared_error(outputs, original))
    return float((changed - before).square().sum())


def _centered_logits(outputs: Any, task: Task) -> Tensor | None:
    """Logits (N, classes, ...) minus their mean over the classes, which changes no softmax; None without logits."""
    logits = task.logits(outputs)
    if logits is None or task.independent_classes or logits.ndim < 2 or logits.shape[1] == 1:
        return logits
    return logits - logits.mean(1, keepdim=True)
