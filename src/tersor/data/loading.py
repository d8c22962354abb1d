"""Load data as a recipe describes it: training, validation and test images, mean and standard deviation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.data.datasets import from_name
from tersor.data.image_folder import from_folder
from tersor.data.image_sets import CHUNK, Channels, Images, Splits, View, bytes_in_memory, class_numbers, in_memory
from tersor.data.stratified import generator, stratified

MEMORY = 2 * 2**30
"""A data set of at most this many bytes of pixels is decoded once and kept in memory."""

STATISTICS_OF = 10_000
"""Maximum number of training images for mean and standard deviation."""

_VALIDATION, _LIMIT, _STATISTICS = 0, 1, 2  # streams of random numbers


def load(
    *,
    folder: str | Path | None = None,
    name: str | None = None,
    root: str | Path | None = None,
    image_size: int | None = None,
    validation: float = 0.1,
    limit: int | None = None,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Splits:
    """Load training, validation and test images; they are kept in memory if they take at most 2 GiB.

    >>> digits = load(name="digits")
    >>> len(digits.train), len(digits.validation), len(digits.test), digits.train.size
    (1294, 144, 359, (8, 8))

    Args:
        folder: `folder/{train,test}/<class>/*.jpg`, or `folder/<class>/*.jpg`, whose test set is a fifth of every
            class, the same for every seed (see `image_folder`).
        name: in place of a folder: "digits", a torchvision data set ("CIFAR10"), or "package.module:function", which
            is called with `root` if it accepts that, and returns `Splits` or a pair (train, test) of torch Datasets
            of (PIL image or uint8 tensor, class number).
        root: the folder of torchvision's files. Nothing is downloaded.
        image_size: the shorter side is resized to this many pixels and the centre is cropped to a square; None if all
            images have the same size.
        validation: fraction of the training images to hold out, in [0, 1), stratified by class; ignored if the data
            set has validation images.
        limit: number of images to train on, stratified by class; drawn after the validation images.
        seed: 0 or more; draws the validation images and the limited training images.
        mean: of red, green and blue in [0, 1]; None computes mean and `std` from the training images.
        std: of red, green and blue in [0, 1].

    Raises:
        InputError: an argument is invalid, files are missing or damaged, or there are too few images.
    """
    _check(image_size, validation, limit, mean, std)
    splits = _source(folder, name, root, image_size)
    _check_splits(splits, image_size)
    splits = _limited(_with_validation(splits, validation, seed), limit, seed)
    if sum(bytes_in_memory(images) for images in (splits.train, splits.validation, splits.test)) <= MEMORY:
        splits = replace(
            splits,
            train=in_memory(splits.train),
            validation=in_memory(splits.validation),
            test=in_memory(splits.test),
        )
    if mean is not None and std is not None:
        return replace(splits, mean=_channels(mean), std=_channels(std))
    if splits.mean is not None and splits.std is not None:
        return splits
    mean, std = channel_statistics(splits.train, seed)
    return replace(splits, mean=mean, std=std)


def channel_statistics(images: Images, seed: int) -> tuple[Channels, Channels]:
    """Mean and standard deviation of red, green and blue in [0, 1], over at most 10,000 images drawn by `seed`.

    Both are computed from histograms of the 256 values, so that they do not depend on the order of summation. The
    standard deviation of a constant channel is 1.
    """
    drawn = torch.randperm(len(images), generator=generator(seed, _STATISTICS))[:STATISTICS_OF].sort().values
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for index in drawn.split(CHUNK):
        for channel, values in enumerate(images.take(index).unbind(1)):
            counts[channel] += torch.bincount(values.flatten(), minlength=256)
    share = counts.double() / counts.sum(1, keepdim=True)
    value = torch.arange(256, dtype=torch.float64) / 255
    mean = (share * value).sum(1)
    std = (share * (value - mean[:, None]) ** 2).sum(1).sqrt()
    std[std < 1e-6] = 1
    return _channels(mean.tolist()), _channels(std.tolist())


def _source(folder: str | Path | None, name: str | None, root: str | Path | None, image_size: int | None) -> Splits:
    if (folder is None) == (name is None):
        raise InputError(
            f"data needs {'folder or name, and has neither' if folder is None else 'either folder or name, not both'}. "
            "Write folder: path/to/images, or name: digits."
        )
    if folder is None:
        assert name is not None
        return from_name(name, None if root is None else Path(root).expanduser(), image_size)
    if root is not None:
        raise InputError("root is used only with name, not with folder. Leave root out.")
    return from_folder(Path(folder).expanduser(), image_size)


def _with_validation(splits: Splits, share: float, seed: int) -> Splits:
    if len(splits.validation) or not share:
        return splits
    labels = _strata(splits.train)
    count = max(1, round(share * len(labels)))
    most = len(labels) - int((torch.bincount(labels) > 0).sum())
    if count > most:
        raise InputError(
            f"validation {share} would hold out {count} of {len(labels)} training images, but at most {most} are "
            "possible: at least one image of every class must remain for training. Add images, or write validation: 0."
        )
    held_out, rest = stratified(labels, count, generator(seed, _VALIDATION), leave=1)
    return replace(splits, train=View(splits.train, rest), validation=View(splits.train, held_out))


def _strata(images: Images) -> Tensor:
    """What splits are stratified by (N,): class numbers, or a single stratum for other targets."""
    labels = class_numbers(images)
    return torch.zeros(len(images), dtype=torch.int64) if labels is None else labels


def _limited(splits: Splits, limit: int | None, seed: int) -> Splits:
    if limit is None:
        return splits
    labels = _strata(splits.train)
    classes = int((torch.bincount(labels) > 0).sum())
    if not classes <= limit <= len(labels):
        raise InputError(
            f"limit is {limit}, but there are {len(labels)} training images (without validation images) of {classes} "
            f"classes. Write a number from {classes} to {len(labels)}, or leave limit out."
        )
    drawn, _ = stratified(labels, limit, generator(seed, _LIMIT), at_least=1)
    return replace(splits, train=View(splits.train, drawn))


def _check(
    image_size: int | None,
    validation: float,
    limit: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> None:
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size is {image_size}. Write 1 or more pixels.")
    if not 0 <= validation < 1:
        raise InputError(f"validation is {validation}. Write a fraction of at least 0 (none) and below 1, such as 0.1.")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}. Write 1 or more images, or leave limit out.")
    if (mean is None) != (std is None):
        raise InputError("mean and std belong together. Write both, or neither to have them computed.")
    if mean is not None and not (len(mean) == 3 and all(0 <= value <= 1 for value in mean)):
        raise InputError(f"mean is {list(mean)}. Write three numbers in [0, 1], for pixels in [0, 1].")
    if std is not None and not (len(std) == 3 and all(0 < value < float("inf") for value in std)):
        raise InputError(f"std is {list(std)}. Write three numbers above 0, for pixels in [0, 1].")


def _check_splits(splits: Splits, image_size: int | None) -> None:
    sets = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    classes = len(splits.classes)
    labelled = class_numbers(splits.train) is not None
    if labelled and classes < 2:
        raise InputError(f"the data has a single class ({''.join(splits.classes)}). At least two are needed.")
    if len(splits.train) < 2 or not len(splits.test):
        raise InputError(
            f"the data has {len(splits.train)} training and {len(splits.test)} test images. At least two training "
            "images and one test image are needed."
        )
    for which, images in sets.items():
        if labelled:
            _check_labels(which, images.targets, classes)
        if len(images) and images.size != splits.train.size:
            raise InputError(
                f"training images have {splits.train.size[1]}x{splits.train.size[0]} pixels, {which} images "
                f"{images.size[1]}x{images.size[0]}. Write image_size, the side of the square that all are resized to."
            )
    if image_size is not None and splits.train.size != (image_size, image_size):
        raise InputError(
            f"the function returned images of {splits.train.size[1]}x{splits.train.size[0]} pixels, but image_size is "
            f"{image_size}. Resize them in the function and leave image_size out."
        )


def _check_labels(which: str, labels: Tensor, classes: int) -> None:
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        low, high = int(labels.min()), int(labels.max())
        advice = f"Number the classes from 0 to {classes - 1}"
        if (low, high) == (1, classes):
            advice += ": subtract 1 from every label"
        raise InputError(f"{which} labels range from {low} to {high}, but there are {classes} classes. {advice}.")


def _channels(values: Sequence[float]) -> Channels:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
