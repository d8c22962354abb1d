"""Labelled images in memory or decoded on demand, and their division into training, validation and test sets."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersor.core.errors import InputError

Channels = tuple[float, float, float]

CHUNK = 1024
"""Images decoded at once when a whole set is decoded: enough for the threads, few enough for the memory."""

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
        """Return the images at `index` (B,) as uint8 (B, 3, H, W); the same at every call."""
        ...


class Pixels:
    """Images in memory.

    Args:
        pixels: (N, H, W, 3) uint8.
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
        """Return a copy, uint8 (B, 3, H, W) in channels_last order."""
        return self._pixels.index_select(0, index).permute(0, 3, 1, 2)


class Decoded:
    """Images decoded at every call.

    Args:
        labels: (N,) int64.
        read: number of an image -> its pixels (H, W, 3); called from several threads if `threads` > 1.
        threads: number of images decoded in parallel.

    Raises:
        InputError: there is no image, or `read` raises it for the first one.
    """

    def __init__(self, labels: Tensor, read: Callable[[int], NDArray[np.uint8]], threads: int = THREADS) -> None:
        if not len(labels):
            raise InputError("a data set has no images. At least two training images and one test image are needed.")
        self.labels = labels
        self._read = read
        self._threads = threads
        height, width, _ = read(0).shape
        self.size = (height, width)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Tensor:
        """Return uint8 (B, 3, H, W) in channels_last order.

        Raises:
            InputError: an image cannot be decoded, or its size differs from the first one's.
        """
        numbers = index.tolist()
        pixels = np.empty((len(numbers), *self.size, 3), np.uint8)

        def decode(places: range) -> None:
            for place in places:
                pixels[place] = self._checked_size(self._read(numbers[place]))

        if self._threads == 1:
            decode(range(len(numbers)))
        else:
            run = max(1, len(numbers) // (4 * self._threads))
            runs = [range(start, min(start + run, len(numbers))) for start in range(0, len(numbers), run)]
            with ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(decode, runs))  # raises what a thread raised
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def _checked_size(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        height, width, _ = image.shape
        if (height, width) != self.size:
            raise InputError(
                f"the images differ in size: {self.size[1]}x{self.size[0]} and {width}x{height} pixels, for example. "
                "Write image_size, the side of the square that all are resized and cropped to, such as image_size: 224."
            )
        return image


class View:
    """A selection of another set's images.

    Args:
        images: the other set.
        index: (M,) numbers of its images.
    """

    def __init__(self, images: Images, index: Tensor) -> None:
        self._images = images
        self._index = index
        self.labels = images.labels[index]
        self.size = images.size

    def __len__(self) -> int:
        return len(self._index)

    def take(self, index: Tensor) -> Tensor:
        """Return uint8 (B, 3, H, W)."""
        return self._images.take(self._index[index])


@dataclass(frozen=True)
class Splits:
    """Training, validation and test images with the same classes.

    Attributes:
        train: the images to train on.
        validation: the images to choose by; may be empty.
        test: the images for the reported results only.
        classes: the name of each class number.
        mean: of red, green and blue in [0, 1]; subtracted from every pixel.
        std: of red, green and blue in [0, 1]; every pixel is then divided by it.
    """

    train: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]
    mean: Channels | None = None
    std: Channels | None = None


def in_memory(images: Images) -> Pixels:
    """Decode all images into memory."""
    if isinstance(images, Pixels):
        return images
    pixels = torch.empty((len(images), *images.size, 3), dtype=torch.uint8)
    for start in range(0, len(images), CHUNK):
        index = torch.arange(start, min(start + CHUNK, len(images)))
        pixels[start : start + len(index)] = images.take(index).permute(0, 2, 3, 1)
    return Pixels(pixels, images.labels)


def bytes_in_memory(images: Images) -> int:
    """Size of the decoded images in bytes."""
    return len(images) * images.size[0] * images.size[1] * 3
