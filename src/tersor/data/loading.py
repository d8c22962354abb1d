"""Load data as a recipe describes it: training, validation and test images, mean and standard deviation."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tersor.core.errors import InputError
from tersor.data.coco_folder import files_of, from_coco
from tersor.data.csv_file import from_csv
from tersor.data.datasets import SceneTargets, from_datasets, from_name
from tersor.data.decoding import ImageFormat
from tersor.data.image_folder import from_folder
from tersor.data.image_sets import CHUNK, Images, Splits, bytes_in_memory, in_memory
from tersor.data.mask_folder import from_mask_folder, has_masks
from tersor.data.mean_and_std import Channels, channel_values, check_mean_and_std
from tersor.data.split_checks import check_splits, check_targets
from tersor.data.splitting import limited, with_validation
from tersor.data.stratified import generator
from tersor.data.voc_folder import from_voc, is_voc

MEMORY = 2 * 2**30
"""A data set of at most this many bytes of pixels is decoded once and kept in memory."""

STATISTICS_OF = 10_000
"""Maximum number of training images for mean and standard deviation."""

_STATISTICS = 2  # a stream of random numbers; `splitting` has others


def load(
    *,
    folder: str | Path | None = None,
    csv: str | Path | None = None,
    name: str | None = None,
    datasets: Mapping[str, Any] | None = None,
    root: str | Path | None = None,
    targets: SceneTargets = "masks",
    image_size: int | Sequence[int] | None = None,
    channels: int | None = None,
    validation: float = 0.1,
    limit: int | None = None,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Splits:
    """Load training, validation and test images; they are kept in memory if they take at most 2 GiB.

    The kind of targets is detected from the data: class indices, values, masks or boxes. Exactly one of `folder`,
    `csv`, `name` and `datasets` is given.

    >>> digits = load(name="digits")
    >>> len(digits.train), len(digits.validation), len(digits.test), digits.train.size
    (1294, 144, 359, (8, 8))

    Args:
        folder: images in class folders or without classes, images and masks, Pascal VOC or COCO; the layout is detected
            from the content of the folder.
        csv: a file of paths and classes or values.
        name: "digits", "scenes", a torchvision data set ("CIFAR10"), or "package.module:function", which is called with
            `root` if it accepts that, and returns `Splits`, a pair (train, test) of Datasets, or a dict of them.
        datasets: "train", "test" and perhaps "validation": torch or Hugging Face data sets, or lists. An item is a pair
            (image, target) or a dict; its image is a PIL image or a uint8 tensor (C, H, W) that is not normalized.
        root: the folder of torchvision's files. Nothing is downloaded.
        targets: "masks" or "boxes", the targets of "scenes".
        image_size: height and width in pixels, or one number for both; None if all images have the same size. Images
            with classes or values are resized until they cover it, and the center is cropped. Images with masks or
            boxes are resized to exactly this size, with their targets.
        channels: 1 (grayscale), 3 (RGB) or 4; data sets of tensors may have any number. By default 3, or the number of
            channels of the `Splits` that a function returns. Images with 16 bits per channel keep the 16 bits.
        validation: fraction of the training images to hold out, in [0, 1), stratified by class; ignored if the data
            set has validation images.
        limit: number of images to train on, stratified by class; drawn after the validation images.
        seed: 0 or more; seed for drawing the validation images and, with `limit`, the training images.
        mean: mean of each channel in [0, 1]; None computes mean and `std` from the training images. For a network that
            was trained on images in [0, 1] without normalization, pass 0 for each channel, and 1 as `std`.
        std: standard deviation of each channel in [0, 1].

    Raises:
        InputError: an argument is invalid, files are missing or damaged, or there are too few images.
    """
    size = sides_of(image_size)
    mean, std = (None if each is None else channel_values(name, each) for name, each in (("mean", mean), ("std", std)))
    _check(channels, validation, limit, mean, std)
    form = ImageFormat(size) if channels is None else ImageFormat(size, channels)
    splits = _source({"folder": folder, "csv": csv, "name": name, "datasets": datasets}, root, targets, form)
    check_splits(splits, size, channels)
    check_mean_and_std(splits.train.channels, mean, std)
    splits = limited(with_validation(splits, validation, seed), limit, seed)
    if sum(bytes_in_memory(images) for images in (splits.train, splits.validation, splits.test)) <= MEMORY:
        splits = replace(
            splits,
            train=in_memory(splits.train),
            validation=in_memory(splits.validation),
            test=in_memory(splits.test),
        )
        check_targets(splits)
    if mean is not None and std is not None:
        return replace(splits, mean=mean, std=std)
    if splits.mean is not None and splits.std is not None:
        return splits
    mean, std = channel_statistics(splits.train, seed)
    return replace(splits, mean=mean, std=std)


def channel_statistics(images: Images, seed: int) -> tuple[Channels, Channels]:
    """Mean and standard deviation of each channel in [0, 1], over at most 10,000 images drawn by `seed`.

    Both are computed from histograms of the values, so that they do not depend on the order of summation. The standard
    deviation of a constant channel is 1.
    """
    drawn = torch.randperm(len(images), generator=generator(seed, _STATISTICS))[:STATISTICS_OF].sort().values
    counts = torch.zeros(images.channels, images.largest + 1, dtype=torch.int64)
    for index in drawn.split(CHUNK):
        for channel, values in enumerate(images.take(index).unbind(1)):
            whole = values.flatten() if values.dtype == torch.uint8 else values.flatten().to(torch.int32)
            counts[channel] += torch.bincount(whole, minlength=counts.shape[1])
    share = counts.double() / counts.sum(1, keepdim=True)
    value = torch.arange(counts.shape[1], dtype=torch.float64) / images.largest
    mean = (share * value).sum(1)
    std = (share * (value - mean[:, None]) ** 2).sum(1).sqrt()
    std[std < 1e-6] = 1
    return tuple(mean.tolist()), tuple(std.tolist())


def _source(given: Mapping[str, Any], root: str | Path | None, targets: SceneTargets, form: ImageFormat) -> Splits:
    named = [key for key, value in given.items() if value is not None]
    if len(named) != 1:
        advice = "Keep one of them." if named else "Write one of them, such as name: digits."
        found = " and ".join(named) or "none"
        raise InputError(f"data needs exactly one of {', '.join(given)}, got {found}. {advice}")
    if root is not None and named != ["name"]:
        raise InputError(f"root is used only with name, not with {named[0]}. Leave root out.")
    if given["name"] is not None:
        return from_name(given["name"], None if root is None else Path(root).expanduser(), form, targets)
    if given["csv"] is not None:
        return from_csv(Path(given["csv"]).expanduser(), form)
    if given["datasets"] is not None:
        return from_datasets("datasets", given["datasets"], form, threads=1)  # a user's data set may not be thread-safe
    return _from_folder(Path(given["folder"]).expanduser(), form)


def _from_folder(folder: Path, form: ImageFormat) -> Splits:
    if not folder.is_dir():
        advice = "Unpack an archive; for a CSV file, write csv instead of folder"
        problem = f"is a file. {advice}" if folder.exists() else "does not exist. Correct the path"
        raise InputError(f"data folder '{folder}' {problem}. Expected: folder/{{train,test}}/<class>/*.jpg.")
    if is_voc(folder):
        return from_voc(folder, form)
    if files_of(folder):
        return from_coco(folder, form)
    return from_mask_folder(folder, form) if has_masks(folder) else from_folder(folder, form)


def sides_of(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Height and width in pixels; None for None.

    Raises:
        InputError: it is neither one whole number nor two.
    """
    if image_size is None:
        return None
    try:
        given = (image_size, image_size) if isinstance(image_size, int) else image_size
        sides = tuple(operator.index(side) for side in given)
    except TypeError:
        sides = ()
    if len(sides) != 2 or min(sides) < 1:
        raise InputError(f"image_size is {image_size!r}. Write 1 or more pixels, or two numbers: [height, width].")
    return sides[0], sides[1]


def _check(
    channels: int | None,
    validation: float,
    limit: int | None,
    mean: Channels | None,
    std: Channels | None,
) -> None:
    if channels is not None and channels < 1:
        raise InputError(f"channels is {channels}. Write 1 (grayscale), 3 (RGB) or 4.")
    if not 0 <= validation < 1:
        raise InputError(f"validation is {validation}. Write a fraction of at least 0 (none) and below 1, such as 0.1.")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}. Write 1 or more images, or leave limit out.")
    if (mean is None) != (std is None):
        raise InputError("mean and std belong together. Write both, or leave out both to have them computed.")
    if channels is not None:
        check_mean_and_std(channels, mean, std)
