"""A batch of labelled images, and how one is read from whatever a user's loader yields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.data.batch_errors import no_images


@dataclass(frozen=True)
class Batch:
    """`images` (N, C, H, W) as the network wants them; `labels` (N,) class numbers, or None; `index` (N,) places
    in the data set, or None.
    """

    images: Tensor
    labels: Tensor | None = None
    index: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        move = lambda tensor: None if tensor is None else tensor.to(device, non_blocking=True)  # noqa: E731
        return Batch(self.images.to(device, non_blocking=True), move(self.labels), move(self.index))


def images_of(batch: Any) -> Tensor:
    """The images of a batch that a user's loader gave: a tensor, a `Batch`, or a tuple that begins with one.

    They are a copy, since a forward may change its input in place. Those in another floating point than float32 are
    converted to it, as every network is.

    Raises:
        InputError: there is no tensor (N, C, H, W) in it.
    """
    first = batch.images if isinstance(batch, Batch) else batch
    if isinstance(first, list | tuple) and first:
        first = first[0]
    if not isinstance(first, Tensor) or first.ndim != 4:
        raise no_images(batch)
    if first.is_meta:
        raise InputError("a batch of the data is on the meta device and has no values. Give images on the CPU.")
    return first.detach().to(torch.float32 if first.is_floating_point() else first.dtype, copy=True)


def labels_of(batch: Any) -> Tensor | None:
    """The class numbers (N,) of a batch that a user's loader gave, where it has some."""
    if isinstance(batch, Batch):
        return batch.labels
    second = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    if not isinstance(second, Tensor) or second.ndim != 1 or second.is_floating_point():
        return None
    return second if len(second) == len(images_of(batch)) else None
