"""A batch of images and targets, and reading it from what a user's loader yields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import tee
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tersor.core.errors import InputError
from tersor.data.batch_errors import images_error
from tersor.data.network_inputs import NetworkInput, TensorInputs, several_inputs

_IMAGES = (4, 5)
"""Numbers of dimensions: images (N, C, H, W), videos (N, C, T, H, W)."""


@dataclass(frozen=True)
class Batch:
    """A batch of images and their targets.

    Attributes:
        images: (N, C, H, W), normalized; or several tensors.
        targets: what the task needs: class indices (N,), masks (N, H, W), values (N, k), a list with a dict of boxes
            and labels for each image, or any other pytree; None where the images have none.
        index: (N,) indices in the data set, or None.
    """

    images: NetworkInput
    targets: Any = None
    index: Tensor | None = None

    @property
    def only_images(self) -> Tensor:
        """The images of a batch that has no other inputs, such as every batch of a recipe."""
        assert isinstance(self.images, Tensor)
        return self.images

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        move = lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf  # noqa: E731
        return Batch(self.images.to(device), tree_map(move, self.targets), move(self.index))


def as_batch(value: object) -> Batch:
    """Convert a pair (images, targets) to a `Batch`; a `Batch` is returned unchanged.

    Several inputs are a tuple, list or dict of tensors.

    Raises:
        InputError: it is something else.
    """
    if isinstance(value, Batch):
        return value
    if isinstance(value, tuple | list) and len(cast("list[Any]", value)) == 2:
        images, targets = cast("list[Any]", value)
        inputs = several_inputs(images)
        return Batch(images if inputs is None else inputs, targets)
    raise InputError(
        f"a batch is of type {type(value).__name__}. Pass tersor.data.batch.Batch(images, targets), or a tuple "
        "(images, targets)."
    )


def parts_of(batch: Any) -> tuple[Any, Any]:
    """Return what a user's batch holds as images and as targets, unchecked; None where there is nothing.

    In a mapping (`{"pixel_values": ..., "labels": ...}`), images are the only value of four dimensions, or of five for
    videos, and targets the only other tensor or array of one dimension.
    """
    if isinstance(batch, Batch):
        return batch.images, batch.targets
    if isinstance(batch, Mapping):
        values = list(cast("Mapping[Any, Any]", batch).values())
        images = [value for value in values if getattr(value, "ndim", None) in _IMAGES]
        labels = [value for value in values if getattr(value, "ndim", None) == 1]
        return images[0] if len(images) == 1 else None, labels[0] if len(labels) == 1 else None
    if isinstance(batch, list | tuple) and batch:
        items = cast("list[Any]", batch)
        return items[0], items[1] if len(items) > 1 else None
    return batch, None


def images_of(batch: Any) -> NetworkInput:
    """Return a copy of the images of a user's batch: a tensor, a `Batch`, a tuple or list that begins with one, a dict.

    Several input tensors are a tuple, list or dict in place of the images: `((left, right), targets)`.

    Videos (N, C, T, H, W) are images here.

    Floating-point images are converted to float32, as every network is. A copy, because a forward pass may change its
    input in place.

    Raises:
        InputError: the batch does not begin with a tensor (N, C, H, W) that has values.
    """
    first, _ = parts_of(batch)
    inputs = first if isinstance(first, TensorInputs) else several_inputs(first)
    if inputs is not None:
        return inputs.map(_copied)
    if not isinstance(first, Tensor) or first.ndim not in _IMAGES:
        raise images_error(batch)
    return _copied(first)


def _copied(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise InputError("a batch of the data is on the meta device and has no values. Pass images on the CPU.")
    return tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def labels_of(batch: Any) -> Tensor | None:
    """Return the class indices (N,) of a user's batch, or None if it has no valid ones."""
    _, second = parts_of(batch)
    if not isinstance(second, Tensor) or second.ndim != 1 or second.is_floating_point():
        return None
    return second if len(second) == len(images_of(batch)) else None


class OnePass(Iterator[Any]):
    """Batches that can be iterated once; the iteration includes those that `ahead` returned."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches

    def __next__(self) -> Any:
        return next(self._batches)

    def ahead(self) -> Iterator[Any]:
        """The next batches, which this does not consume."""
        self._batches, ahead = tee(self._batches)
        return ahead


def first_batch(data: Iterable[Any] | None, method: str) -> NetworkInput:
    """The images of the first batch of `data` that is not empty.

    Raises:
        InputError: `method` needs images and there are none, or the images are not floating point.
    """
    if data is None:
        raise InputError(f"{method} needs images to run the network on; none were given. Pass AttachContext(data=...).")
    for batch in data.ahead() if isinstance(data, OnePass) else data:
        images = images_of(batch)
        if not images.is_floating_point():
            raise InputError(f"a batch of the data has the type {images.dtype}. Pass normalized floating-point images.")
        if len(images):
            return images
    raise InputError(f"{method} needs images, and the data contains none. Pass batches (N, C, H, W).")
