"""Random changes of whole batches of pixels that leave the label true."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Augmentation = Literal["none", "flip", "crop_flip"]
AUGMENTATIONS: tuple[str, ...] = get_args(Augmentation)


def augmented(pixels: Tensor, augment: Augmentation, draw: torch.Generator) -> Tensor:
    """The batch with every image flipped or not, and moved by up to an eighth of its size for `crop_flip`.

    A moved image is what one crops out of it after padding by reflection. Padding, crop and flip are one gather:
    all they do is to say which row and column of the image a pixel comes from.

    Args:
        pixels: (B, H, W, 3), contiguous.
        augment: "none", "flip" (left and right, half of the images) or "crop_flip".
        draw: where the random numbers come from.
    """
    if augment == "none":
        return pixels
    batch, height, width, channels = pixels.shape
    flips = torch.rand(batch, 1, generator=draw) < 0.5
    rows = torch.arange(height).expand(batch, height)
    columns = torch.where(flips, torch.arange(width).flip(0), torch.arange(width))
    if augment == "crop_flip":
        rows = _reflected(rows + _moves(batch, height // 8, draw), height)
        columns = _reflected(columns + _moves(batch, width // 8, draw), width)
    places = (torch.arange(batch)[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
    return pixels.view(-1, channels).index_select(0, places.flatten()).view(pixels.shape)


def _moves(batch: int, furthest: int, draw: torch.Generator) -> Tensor:
    return torch.randint(-furthest, furthest + 1, (batch, 1), generator=draw)


def _reflected(places: Tensor, length: int) -> Tensor:
    """Places beyond an edge of [0, length) mirrored at it, the edge itself not repeated."""
    return (length - 1) - ((length - 1) - places.abs()).abs()
