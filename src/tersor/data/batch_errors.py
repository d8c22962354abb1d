"""Error messages for invalid batches of a user's loader."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from tersor.core.errors import InputError

_ONE_VALUE = "Expected more than 1 value per channel"
_POSSIBLE = (
    "Possible: a tensor (N, C, H, W), a tuple or list that begins with one, or a dict that holds one; videos are "
    "(N, C, T, H, W)."
)


def images_error(batch: Any) -> InputError:
    """Return the error for a batch that does not begin with images (N, C, H, W)."""
    first: Any = batch
    while isinstance(first, list | tuple) and first:
        first = cast("list[Any]", first)[0]
    if isinstance(first, Tensor):
        described = f"a tensor of shape {tuple(first.shape)}"
        if first.ndim == 3:
            return InputError(
                f"a batch of the data is {described}. {_POSSIBLE} For a single image (C, H, W), wrap the data set in a "
                "DataLoader, or write image[None]. For grayscale images (N, H, W), write images[:, None]."
            )
        return InputError(f"a batch of the data is {described}. {_POSSIBLE}")
    kind = type(first).__name__
    if isinstance(first, dict):
        keys = ", ".join(repr(key) for key in cast("dict[Any, Any]", first))
        advice = (
            f"It has the keys {keys}; exactly one of them must hold a tensor of four or five dimensions. Pass "
            "[(batch[...], batch[...]) for batch in loader]; for a network of several inputs, "
            "[({'name': batch[...], ...}, batch[...]) for batch in loader]."
        )
    elif type(first).__module__.partition(".")[0] == "numpy":
        advice = "Pass torch.from_numpy(array)."
    elif type(first).__module__.partition(".")[0] == "PIL":
        advice = "Add a transform to the data set, such as torchvision.transforms.ToTensor() and Normalize."
    else:
        advice = ""
    return InputError(f"a batch of the data is of type {kind}. {_POSSIBLE} {advice}".rstrip())


def labels_error(labels: Tensor, images: int, classes: int | None, least: int | None = None) -> InputError | None:
    """Return the error for labels that are not class indices (N,), or None if they are valid.

    Args:
        labels: the labels of a batch.
        images: N.
        classes: number of classes of the network, if known.
        least: the lowest label of all earlier batches.
    """
    of = f"the labels of a batch have the data type {labels.dtype} and the shape {tuple(labels.shape)}"
    numbers = f"class indices ({images},) from 0" + (f" to {classes - 1}" if classes else "")
    if labels.shape != (images,):
        if labels.shape == (images, 1):
            return InputError(f"{of}. Possible: {numbers}. Write labels.squeeze(1).")
        if labels.ndim == 2 and len(labels) == images:
            return InputError(f"{of}, like one-hot or soft labels. Possible: {numbers}. Write labels.argmax(1).")
        return InputError(f"{of}. Possible: {numbers}.")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return InputError(
            f"{of}, with values from {labels.min()} to {labels.max()}. Possible: {numbers}. Write labels.long()."
        )
    if not images:
        return None
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        return InputError(f"{of}, with values from {low} to {high}. Possible: {numbers}. Leave out unlabeled images.")
    least = low if least is None else min(least, low)
    if classes is not None and high == classes and least > 0:
        return InputError(
            f"the labels range from {least} to {high}, but the {classes} classes of the network are numbered from 0 to "
            f"{classes - 1}. Write labels - 1."
        )
    if classes is not None and high >= classes:
        return InputError(
            f"{of}, with values from {low} to {high}. Possible: {numbers}, because the network has {classes} classes."
        )
    return None


@contextmanager
def explain_batchnorm_error(images: int) -> Generator[None]:
    """Wrap a training step on a batch of `images` images.

    Raises:
        InputError: BatchNorm has a single value per channel, which has no variance.
    """
    try:
        yield
    except ValueError as error:
        if _ONE_VALUE not in str(error):
            raise
        raise InputError(
            f"BatchNorm needs more than one value per channel, but a batch has {images} image{'s' * (images > 1)}. "
            "Drop a short last batch (drop_last=True), or write another batch size."
        ) from error
