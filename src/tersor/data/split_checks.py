"""Checks of the training, validation and test images against each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor.core.errors import InputError, counted
from tersor.data.image_sets import Images, Splits, class_numbers
from tersor.data.mask_folder import IGNORE


def check_splits(splits: Splits, image_size: tuple[int, int] | None, channels: int | None) -> None:
    """Check numbers, sizes and class indices of the images.

    Raises:
        InputError: there are too few images or classes, or the sets differ.
    """
    classes = len(splits.classes)
    if class_numbers(splits.train) is not None and classes < 2:
        raise InputError(f"the data has a single class ({''.join(splits.classes)}). At least two are needed.")
    if len(splits.train) < 2 or not len(splits.test):
        raise InputError(
            f"the data has {len(splits.train)} training and {len(splits.test)} test images. At least two training "
            "images and one test image are needed."
        )
    for which, images in _sets(splits).items():
        labels = class_numbers(images)
        if labels is not None:
            _check_labels(which, labels, classes)
        if len(images):
            _check_alike(which, images, splits.train)
    if image_size is not None and splits.train.size != image_size:
        raise InputError(
            f"the function returned images of {_shown(splits.train.size)} pixels, but image_size is "
            f"{image_size[0] if image_size[0] == image_size[1] else list(image_size)}. Resize them in the function, "
            "or leave out image_size if you wrote it."
        )
    found = splits.train.channels
    if channels is not None and found != channels:
        raise InputError(
            f"the images have {counted(found, 'channel')}, but channels is {channels}. Write channels: {found} in a "
            f"recipe, channels={found} in Python, or leave out --channels of `tersor compress`."
        )


def check_targets(splits: Splits) -> None:
    """Check the class indices of masks and boxes in memory.

    Raises:
        InputError: there are more classes than names.
    """
    for which, images in _sets(splits).items():
        targets: Any = images.targets
        if isinstance(targets, Tensor) and targets.ndim == 3 and targets.dtype == torch.uint8:
            numbers = targets[targets != IGNORE]
        elif isinstance(targets, list) and targets and isinstance(targets[0], dict):
            numbers = torch.cat([each["labels"] for each in targets])
        else:
            continue
        if numbers.numel() and int(numbers.max()) >= len(splits.classes):
            raise InputError(
                f"the {which} images have the class index {int(numbers.max())}, and there are {len(splits.classes)} "
                f"classes: {', '.join(splits.classes[:12])}. Possible: 0 to {len(splits.classes) - 1}."
            )


def _sets(splits: Splits) -> dict[str, Images]:
    return {"training": splits.train, "validation": splits.validation, "test": splits.test}


def _check_alike(which: str, images: Images, train: Images) -> None:
    if images.size != train.size:
        raise InputError(
            f"training images have {_shown(train.size)} pixels, {which} images {_shown(images.size)}. Resize "
            "them: write data.image_size: 224 in a recipe, --image-size 224, or image_size=224 in Python."
        )
    if images.largest != train.largest:
        raise InputError(
            f"training images have values up to {train.largest}, {which} images up to {images.largest}. Convert "
            "them to the same number of bits per channel."
        )


def _check_labels(which: str, labels: Tensor, classes: int) -> None:
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        low, high = int(labels.min()), int(labels.max())
        advice = f"Number the classes from 0 to {classes - 1}"
        if (low, high) == (1, classes):
            advice += ": subtract 1 from every label"
        raise InputError(f"{which} labels range from {low} to {high}, but there are {classes} classes. {advice}.")


def _shown(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
