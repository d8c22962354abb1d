"""Check of the mean and standard deviation of images: does a network classify better with other common values?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tersor.data.batch import Batch
from tersor.tasks.task import Task
from tersor.training.teacher_check import logits_and_labels

_IMAGES = 128
_SIGNIFICANT = 3.0
"""Standard errors of the difference between two networks on the same images (McNemar's test)."""
_COMMON = (
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
)
"""No normalization, values from -1 to 1, and ImageNet's."""


def normalization_warning(
    name: str,
    network: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> str:
    """A sentence about a classifier that is significantly better with other common values; "" for any other network.

    Args:
        name: the network's name in the sentence.
        network: it is not changed.
        batches: images that are normalized with `mean` and `std`; the first 128 are used.
        task: only classification is checked, with logits (N, classes).
        mean: mean of each channel in [0, 1]; None for images that are not normalized here, which are not checked.
        std: standard deviation of each channel in [0, 1].
    """
    right = _right(network, batches, task) if mean and std else None
    if right is None or bool(right.all()):
        return ""
    assert mean
    assert std
    better: list[tuple[float, str]] = []
    for other_mean, other_std in _COMMON:
        others = other_mean[: len(mean)], other_std[: len(mean)]
        if len(mean) > len(other_mean) or torch.allclose(torch.tensor(others), torch.tensor((mean, std)), atol=0.01):
            continue
        found = _right(network, _normalized(batches, (mean, std), others), task)
        assert found is not None
        gained, lost = int((found & ~right).sum()), int((right & ~found).sum())
        if gained - lost > _SIGNIFICANT * math.sqrt(gained + lost):
            better.append((_percent(found), f"mean {_shown(others[0])} and std {_shown(others[1])}"))
    if not better:
        return ""
    percent, values = max(better)
    return (
        f"{name} classifies {_percent(right):.1f} % of {len(right)} images correctly with mean {_shown(mean)} and std "
        f"{_shown(std)}, but {percent:.1f} % with {values}. Give the mean and std that it was trained with."
    )


def _right(network: nn.Module, batches: Iterable[Batch], task: Task) -> Tensor | None:
    """Which labeled images (N,) are classified correctly."""
    found = logits_and_labels(network, batches, task, _IMAGES)
    if found is None:
        return None
    logits, labels = found
    return (logits.argmax(1) == labels)[labels >= 0]


def _normalized(
    batches: Iterable[Batch], before: tuple[Sequence[float], ...], after: tuple[Sequence[float], ...]
) -> Iterator[Batch]:
    """The same images with another mean and standard deviation."""
    (mean, std), (other_mean, other_std) = (
        [torch.tensor(values).reshape(-1, 1, 1) for values in both] for both in (before, after)
    )
    for batch in batches:
        yield replace(batch, images=(batch.only_images * std + mean - other_mean) / other_std)


def _percent(right: Tensor) -> float:
    return 100 * float(right.float().mean())


def _shown(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)
