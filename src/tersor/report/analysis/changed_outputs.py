"""Changed predictions of networks other than classifiers: masks and boxes drawn, values written, scores by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils._pytree import tree_map

from tersor.data import Images
from tersor.report.analysis.predictions import png, rgb_of
from tersor.tasks.detection import CONFIDENT, Detection
from tersor.tasks.segmentation import Segmentation
from tersor.tasks.task import Task

_EXAMPLES = 8
_VALUES = 8
_SIDE = 160
_GOLDEN_ANGLE = 137.508
"""Degrees between the hues of neighboring classes, which keeps them apart for any number of classes."""


def compare_outputs(
    task: Task, images: Images, classes: Sequence[str], targets: Any, before: Any, after: Any
) -> dict[str, Any]:
    """Compare the predictions of two networks, as plain values.

    Args:
        task: the task of the networks.
        images: N images.
        classes: names of the classes; empty if there are none.
        targets: targets of the N images, or None.
        before: predictions of the first network for the N images.
        after: predictions of the second.

    Returns:
        Number of `images` and prediction `agreement` (percent); `classes`: name and scores `before` and `after` (None
        where a class does not occur); `examples`: the 8 images with the least agreement, each with its `agreement`,
        and `pictures` (title -> PNG) or `values` (title -> text).
    """
    agreement = task.agreement(after, before)
    changed = [index for index in agreement.argsort(stable=True).tolist() if agreement[index] < 1][:_EXAMPLES]
    shown = {"original": before, "artifact": after} | ({} if targets is None else {"label": targets})
    return {
        "images": len(images),
        "agreement": 100 * agreement.mean().item(),
        "classes": [] if targets is None else _by_class(task, classes, targets, before, after),
        "examples": [
            {"index": index, "agreement": 100 * agreement[index].item(), **_example(task, images, index, shown)}
            for index in changed
        ],
    }


def _by_class(task: Task, classes: Sequence[str], targets: Any, before: Any, after: Any) -> list[dict[str, Any]]:
    found = [task.score_by_class([(each, targets)], len(classes)) for each in (before, after)] if classes else [None]
    if any(each is None for each in found):
        return []
    known = [[None if isnan(value) else value for value in each.tolist()] for each in found if each is not None]
    return [
        {"class": name, "before": first, "after": second} for name, first, second in zip(classes, *known, strict=True)
    ]


def _example(task: Task, images: Images, index: int, shown: Mapping[str, Any]) -> dict[str, Any]:
    pixels = rgb_of(images, index)
    if isinstance(task, Segmentation):
        pictures = {title: with_mask(pixels, masks[index], task.ignore_index) for title, masks in shown.items()}
        return {"pictures": {title: png(picture, _SIDE) for title, picture in pictures.items()}}
    if isinstance(task, Detection):
        pictures = {title: with_boxes(pixels, boxes[index]) for title, boxes in shown.items()}
        return {"pictures": {title: png(picture, _SIDE) for title, picture in pictures.items()}}
    values = {title: _in_words(_of_image(each, index)) for title, each in shown.items()}
    return {"pictures": {"image": png(pixels, _SIDE)}, "values": values}


def with_mask(pixels: Tensor, mask: Tensor, ignore_index: int) -> Tensor:
    """An image (3, H, W) uint8 with the classes of a mask (h, w) in colors; class 0 and ignored pixels have none."""
    if mask.shape != pixels.shape[1:]:
        mask = torch.nn.functional.interpolate(mask[None, None].float(), pixels.shape[1:], mode="nearest")[0, 0]
    mask = mask.long()
    coloured = (mask != 0) & (mask != ignore_index)
    colours = torch.tensor([_colour(number) for number in range(int(mask.max()) + 1)])
    mixed = (pixels.permute(1, 2, 0).float() * 0.4 + colours[mask] * 0.6).round().to(torch.uint8).permute(2, 0, 1)
    return torch.where(coloured, mixed, pixels)


def with_boxes(pixels: Tensor, found: Mapping[str, Tensor]) -> Tensor:
    """An image (3, H, W) uint8 with its boxes; of predicted ones, those with a score of at least one half."""
    scale = max(1, _SIDE // max(pixels.shape[1:]))
    pixels = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)  # lines stay thin on small images
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    draw = ImageDraw.Draw(image)
    scores = found.get("scores", torch.ones(len(found["labels"])))
    width = max(2, max(image.size) // 60)
    for box, label, score in zip(found["boxes"].tolist(), found["labels"].tolist(), scores.tolist(), strict=True):
        left, top, right, bottom = (scale * each for each in box)
        if score >= CONFIDENT and left <= right and top <= bottom:
            draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(0, 0, 0), width=width + 2)
            draw.rectangle((left, top, right, bottom), outline=_colour(int(label)), width=width)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*pixels.shape[1:], 3).permute(2, 0, 1)


def _colour(number: int) -> tuple[int, int, int]:
    """A saturated color, different for each class."""
    from colorsys import hsv_to_rgb

    red, green, blue = hsv_to_rgb(number * _GOLDEN_ANGLE / 360 % 1, 0.9, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _of_image(predictions: Any, index: int) -> Any:
    if isinstance(predictions, list):
        return predictions[index]
    return tree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, predictions)


def _in_words(value: Any) -> str:
    """A tensor's first values; those of other predictions as Python writes them."""
    if not isinstance(value, Tensor):
        return str(value)[:80]
    if value.dtype == torch.bool:
        return ", ".join(map(str, value.nonzero().flatten().tolist())) or "none"
    flat = value.flatten().tolist()
    return ", ".join(f"{each:.4g}" for each in flat[:_VALUES]) + ", ..." * (len(flat) > _VALUES)
