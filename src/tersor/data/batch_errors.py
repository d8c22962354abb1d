"""What is wrong with a batch that a user's loader gave, and what to write instead."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from tersor.core.errors import InputError

_ONE_VALUE = "Expected more than 1 value per channel"
_POSSIBLE = "Possible: a tensor (N, C, H, W), or a tuple or list that begins with one."


def no_images(batch: Any) -> InputError:
    """An error for a batch that does not begin with images (N, C, H, W)."""
    first: Any = batch
    while isinstance(first, list | tuple) and first:
        first = cast("list[Any]", first)[0]
    if isinstance(first, Tensor):
        what = f"a tensor of shape {tuple(first.shape)}"
        if first.ndim == 3:
            return InputError(
                f"a batch of the data is {what}, a single image. {_POSSIBLE} A data set needs a DataLoader around it; "
                "one image becomes a batch by image[None]."
            )
        return InputError(f"a batch of the data is {what}. {_POSSIBLE}")
    kind = type(first).__name__
    if isinstance(first, dict):
        keys = ", ".join(repr(key) for key in cast("dict[Any, Any]", first))
        advice = f"It has the keys {keys}: give [(batch[...], batch[...]) for batch in loader]."
    elif type(first).__module__.partition(".")[0] == "numpy":
        advice = "Give torch.from_numpy(array)."
    elif type(first).__module__.partition(".")[0] == "PIL":
        advice = "Give the data set a transform, such as torchvision.transforms.ToTensor() and Normalize."
    else:
        advice = ""
    return InputError(f"a batch of the data is of type {kind}. {_POSSIBLE} {advice}".rstrip())


def wrong_labels(labels: Tensor, images: int, classes: int | None, least: int | None = None) -> InputError | None:
    """An error for labels that are no class numbers (N,), or None.

    Args:
        labels: what a batch has where labels belong.
        images: N.
        classes: how many the network tells apart, if that is known.
        least: the lowest label of all batches so far.
    """
    of = f"the labels of a batch are of {labels.dtype}, of shape {tuple(labels.shape)}"
    numbers = f"class numbers ({images},) from 0" + (f" to {classes - 1}" if classes else "")
    if labels.shape != (images,):
        if labels.shape == (images, 1):
            return InputError(f"{of}. Possible: {numbers}. Write labels.squeeze(1).")
        if labels.ndim == 2 and len(labels) == images:
            return InputError(f"{of}: one-hot or soft labels. Possible: {numbers}. Write labels.argmax(1).")
        return InputError(f"{of}. Possible: {numbers}.")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return InputError(f"{of}, from {labels.min()} to {labels.max()}. Possible: {numbers}. Write labels.long().")
    if not images:
        return None
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        return InputError(f"{of}, from {low} to {high}. Possible: {numbers}. Leave out images that have no label.")
    least = low if least is None else min(least, low)
    if classes is not None and high == classes and least > 0:
        return InputError(
            f"the labels go from {least} to {high}; the network has {classes} classes, and no image had label 0. "
            f"Classes are numbered from 0 to {classes - 1}: write labels - 1."
        )
    if classes is not None and high >= classes:
        return InputError(f"{of}, from {low} to {high}. Possible: {numbers}, for {classes} classes of the network.")
    return None


@contextmanager
def single_images_refused(images: int) -> Generator[None]:
    """While a network trains on a batch of so many images.

    Raises:
        InputError: BatchNorm finds a single value for a channel, which has no variance.
    """
    try:
        yield
    except ValueError as error:
        if _ONE_VALUE not in str(error):
            raise
        raise InputError(
            f"BatchNorm needs more than one value for each channel, and a batch has {images} image"
            f"{'s' * (images > 1)}. Leave a short last batch out (drop_last=True), or write another batch size."
        ) from error
