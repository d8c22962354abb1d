"""Labelled images that lie in memory, or that are decoded when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersor.core.errors import InputError

CHUNK = 1024
"""Images that are decoded in one go when all of them are wanted: many for the threads, few for the memory."""

THREADS = min(16, os.cpu_count() or 1)


class Images(Protocol):
    """Labelled RGB images of one size.

    Attributes:
        labels: (N,) int64, class numbers.
        size: height and width in pixels.
    """

    labels: Tensor
    size: tuple[int, int]

    def __len__(self) -> int:
        """N."""
        ...

    def take(self, index: Tensor) -> Tensor:
        """The pixels of the images at `index` (B,), as uint8 (B, 3, H, W); the same at every call."""
        ...


class Pixels:
    """Images in memory.

    Args:
        pixels: (N, H, W, 3) uint8, channels last: as they are decoded, and as convolutions like them.
        labels: (N,) int64.
    """

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        assert pixels.dtype == torch.uint8
        assert pixels.shape[3] == 3
        assert len(pixels) == len(labels)
        self._pixels = pixels
        self.labels = labels
        self.size = (pixels.shape[1], pixels.shape[2])

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) in channels_last order, a copy."""
        return self._pixels.index_select(0, index).permute(0, 3, 1, 2)


class Decoded:
    """Images that are decoded at every call.

    Args:
        labels: (N,) int64.
        read: number of an image -> its pixels (H, W, 3); called from several threads at once if `threads` > 1.
        threads: how many images are decoded side by side.

    Raises:
        InputError: there is no image, or what `read` raises for the first one.
    """

    def __init__(self, labels: Tensor, read: Callable[[int], NDArray[np.uint8]], threads: int = THREADS) -> None:
        if not len(labels):
            raise InputError("a set of no images. Give at least two images to train on, and one to test.")
        self.labels = labels
        self._read = read
        self._threads = threads
        height, width, _ = read(0).shape
        self.size = (height, width)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) in channels_last order.

        Raises:
            InputError: an image cannot be decoded, or is of another size than the first one.
        """
        numbers = index.tolist()
        pixels = np.empty((len(numbers), *self.size, 3), np.uint8)

        def decode(places: range) -> None:
            for place in places:
                pixels[place] = self._of_this_size(self._read(numbers[place]))

        if self._threads == 1:
            decode(range(len(numbers)))
        else:
            run = max(1, len(numbers) // (4 * self._threads))
            runs = [range(start, min(start + run, len(numbers))) for start in range(0, len(numbers), run)]
            with ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(decode, runs))  # the list, so that what a thread raises is raised here
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def _of_this_size(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        height, width, _ = image.shape
        if (height, width) != self.size:
            raise InputError(
                f"images of several sizes: {self.size[1]}x{self.size[0]} and {width}x{height} pixels among others. "
                f"Give image_size, the side of the square that all are resized and cropped to (as in image_size: 224)."
            )
        return image


class View:
    """Some of the images of another set, in another order.

    Args:
        images: the other set.
        index: (M,) places in it.
    """

    def __init__(self, images: Images, index: Tensor) -> None:
        self._images = images
        self._index = index
        self.labels = images.labels[index]
        self.size = images.size

    def __len__(self) -> int:
        return len(self._index)

    def take(self, index: Tensor) -> Tensor:
        """uint8 (B, 3, H, W)."""
        return self._images.take(self._index[index])


def in_memory(images: Images) -> Pixels:
    """The same images, decoded once and for all."""
    if isinstance(images, Pixels):
        return images
    pixels = torch.empty((len(images), *images.size, 3), dtype=torch.uint8)
    for start in range(0, len(images), CHUNK):
        index = torch.arange(start, min(start + CHUNK, len(images)))
        pixels[start : start + len(index)] = images.take(index).permute(0, 2, 3, 1)
    return Pixels(pixels, images.labels)


def bytes_in_memory(images: Images) -> int:
    """What `in_memory` would take."""
    return len(images) * images.size[0] * images.size[1] * 3
