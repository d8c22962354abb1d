"""Images with targets, in memory or decoded on demand, and their division into training, validation and test sets."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

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
    """RGB images of one size, with their targets.

    Attributes:
        targets: class numbers (N,) int64 for classification; another tensor (N, ...); a sequence of N targets that may
            be read on demand; or None.
        size: height and width in pixels.
    """

    targets: Any
    size: tuple[int, int]

    def __len__(self) -> int:
        """N."""
        ...

    def take(self, index: Tensor) -> Tensor:
        """Return the images at `index` (B,) as uint8 (B, 3, H, W); the same at every call."""
        ...

    def targets_at(self, index: Tensor) -> Any:
        """Return the targets at `index` (B,) as a batch has them: a pytree, or None."""
        ...


def class_numbers(images: Images) -> Tensor | None:
    """The targets of all images, if they are class numbers (N,); else None."""
    targets = images.targets
    return targets if isinstance(targets, Tensor) and targets.ndim == 1 and targets.dtype == torch.int64 else None


def targets_of(targets: Any, index: Tensor) -> Any:
    """Return the targets at `index` (B,): tensors of one shape as one tensor (B, ...), others as a list.

    Args:
        targets: a tensor (N, ...), a sequence of N targets, or None.
        index: numbers of images.
    """
    if targets is None or isinstance(targets, Tensor):
        return None if targets is None else targets[index]
    found = [targets[number] for number in index.tolist()]
    if all(isinstance(each, Tensor) and each.shape == found[0].shape for each in found):
        return torch.stack(found)
    return found


class Pixels:
    """Images in memory.

    Args:
        pixels: (N, H, W, 3) uint8.
        targets: see `Images`.
    """

    def __init__(self, pixels: Tensor, targets: Any) -> None:
        assert pixels.dtype == torch.uint8
        assert pixels.shape[3] == 3
        assert targets is None or len(pixels) == len(targets)
        self._pixels = pixels
        self.targets = targets
        self.size = (pixels.shape[1], pixels.shape[2])

    def __len__(self) -> int:
        return len(self._pixels)

    def take(self, index: Tensor) -> Tensor:
        """Return a copy, uint8 (B, 3, H, W) in channels_last order."""
        return self._pixels.index_select(0, index).permute(0, 3, 1, 2)

    def targets_at(self, index: Tensor) -> Any:
        """Return the targets at `index` (B,)."""
        return targets_of(self.targets, index)


class Decoded:
    """Images decoded at every call.

    Args:
        targets: see `Images`; not None.
        read: number of an image -> its pixels (H, W, 3); called from several threads if `threads` > 1.
        threads: number of images decoded in parallel.

    Raises:
        InputError: there is no image, or `read` raises it for the first one.
    """

    def __init__(self, targets: Any, read: Callable[[int], NDArray[np.uint8]], threads: int = THREADS) -> None:
        if not len(targets):
            raise InputError("a data set has no images. At least two training images and one test image are needed.")
        self.targets = targets
        self._read = read
        self._threads = threads
        height, width, _ = read(0).shape
        self.size = (height, width)

    def __len__(self) -> int:
        return len(self.targets)

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

    def targets_at(self, index: Tensor) -> Any:
        """Return the targets at `index` (B,)."""
        return targets_of(self.targets, index)

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
        self.targets = _Selection.of(images.targets, index)
        self.size = images.size

    def __len__(self) -> int:
        return len(self._index)

    def take(self, index: Tensor) -> Tensor:
        """Return uint8 (B, 3, H, W)."""
        return self._images.take(self._index[index])

    def targets_at(self, index: Tensor) -> Any:
        """Return the targets at `index` (B,)."""
        return self._images.targets_at(self._index[index])


class _Selection:
    """Some of a sequence of targets, read on demand."""

    def __init__(self, targets: Any, index: Tensor) -> None:
        self._targets = targets
        self._index = index

    @staticmethod
    def of(targets: Any, index: Tensor) -> Any:
        """The targets at `index` (M,): a tensor of a tensor, None of None."""
        if targets is None or isinstance(targets, Tensor):
            return targets_of(targets, index)
        return _Selection(targets, index)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, number: int) -> Any:
        return self._targets[int(self._index[number])]


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
    return Pixels(pixels, images.targets)


def bytes_in_memory(images: Images) -> int:
    """Size of the decoded images in bytes."""
    return len(images) * images.size[0] * images.size[1] * 3
