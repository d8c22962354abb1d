"""A user's own loader: what it gives is looked at before it is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.objective import Batch, images_of


def given_labels(batch: Any) -> Tensor | None:
    """What lies where labels should, unchecked."""
    if isinstance(batch, Batch):
        return batch.labels
    second = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    return second if isinstance(second, Tensor) else None


class Loader:
    """A user's loader as the loop takes it: batches that it makes anew for every epoch, in an order of its own.

    Args:
        loader: with a length; batches (images, labels), or of images alone.
        classes: how many there are; None where labels are not asked for.
    """

    def __init__(self, loader: Iterable[Any], classes: int | None) -> None:
        self.loader = loader
        self.classes = classes

    def __len__(self) -> int:
        assert isinstance(self.loader, Sized)
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            images, labels = images_of(batch), given_labels(batch)
            yield Batch(images, None if self.classes is None else _checked(labels, len(images), self.classes))

    def set_epoch(self, epoch: int) -> None:
        """A sampler that heeds the epoch (of a distributed run) is told; any other draws its own order."""
        tell = getattr(getattr(self.loader, "sampler", None), "set_epoch", None)
        if callable(tell):
            tell(epoch)


def _checked(labels: Tensor | None, images: int, classes: int) -> Tensor:
    """Labels (N,) as int64."""
    if labels is None:
        raise InputError("a batch has no labels. Give batches (images, labels), or write label_weight=0.")
    whole = not labels.is_floating_point() and labels.dtype != torch.bool and labels.shape == (images,)
    if not whole or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(
            f"the labels of a batch are of {labels.dtype}, of shape {tuple(labels.shape)}, from {labels.min()} to "
            f"{labels.max()}. Possible: class numbers ({images},) from 0 to {classes - 1}."
        )
    return labels.long()
