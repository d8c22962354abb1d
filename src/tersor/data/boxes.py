"""Boxes around the objects in an image: checking them, scaling them with the image, and reading them lazily.

A target is a dict in the format of torchvision's detectors: "boxes" (K, 4) are left, top, right and bottom in pixels,
and "labels" (K,) are class indices from 1; class 0 is the background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.data.decoding import ImageFormat, read_file, size_of
from tersor.data.image_sets import Decoded, LazyTargets

BACKGROUND = "background"

_TOLERANCE = 1
"""Pixels that a box may reach over the edge of its image, because some tools count from 0 and others from 1."""

Target = dict[str, Tensor]


@dataclass(frozen=True)
class BoxedImage:
    """An image file and the objects in it.

    Attributes:
        path: the image file.
        boxes: left, top, right and bottom of each object, in pixels of the file.
        labels: class index of each object, from 1.
        source: name of the annotation in error messages.
    """

    path: str
    boxes: list[list[float]]
    labels: list[int]
    source: str


def boxed_images(records: Sequence[BoxedImage], form: ImageFormat) -> Decoded:
    """Return the images, decoded on every call and resized without cropping, with boxes as targets."""
    form = replace(form, crop=False)

    def target(number: int) -> Target:
        record = records[number]
        size = size_of(record.path)
        found = box_target(record.boxes, record.labels, size, record.source)
        return scaled(found, size, form.size or size)

    return Decoded(LazyTargets(len(records), target), lambda number: read_file(records[number].path, form))


def box_target(boxes: Any, labels: Any, size: tuple[int, int], name: str) -> Target:
    """Return the target of an image.

    Args:
        boxes: (K, 4) numbers, left, top, right and bottom in pixels.
        labels: (K,) class indices from 1.
        size: height and width of the image.
        name: name of the annotation in error messages.

    Raises:
        InputError: a box is outside the image or has no area, or boxes and labels have other shapes or values.
    """
    try:
        corners = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        numbers = torch.as_tensor(labels, dtype=torch.int64).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name} has boxes that are not an array of numbers (K, 4), or labels that are not an array (K,): {error}."
        ) from error
    if len(corners) != len(numbers):
        counts = f"number of boxes: {len(corners)}, number of labels: {len(numbers)}"
        raise InputError(f"{name}: {counts}. Write one label for each box.")
    if len(numbers) and int(numbers.min()) < 1:
        raise InputError(
            f"{name} has the label {int(numbers.min())}. Number the classes of boxes from 1; 0 is the background."
        )
    height, width = size
    limits = torch.tensor([width, height, width, height], dtype=torch.float32)
    for box in corners[((corners < -_TOLERANCE) | (corners > limits + _TOLERANCE) | corners.isnan()).any(1)]:
        raise InputError(
            f"{name} has the box {_shown(box)}, which is outside its image of {width}x{height} pixels. Write left, "
            "top, right and bottom in pixels of the image file."
        )
    inside = corners.clamp(min=torch.zeros(4), max=limits)
    for box in corners[(inside[:, 2:] <= inside[:, :2]).any(1)]:
        raise InputError(
            f"{name} has the box {_shown(box)}, which has no area. Remove it, or write right > left, bottom > top."
        )
    return {"boxes": inside, "labels": numbers}


def scaled(target: Target, size: tuple[int, int], to: tuple[int, int]) -> Target:
    """Scale the boxes of an image of `size` (height, width) that is resized to `to`."""
    if size == to:
        return target
    height, width = to[0] / size[0], to[1] / size[1]
    return target | {"boxes": target["boxes"] * torch.tensor([width, height, width, height])}


def _shown(box: Tensor) -> str:
    return ", ".join(f"{value:g}" for value in box.tolist())
