"""Images with targets, in memory or decoded on demand, and their division into training, validation and test sets."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersor.core.errors import InputError
from tersor.data.mean_and_std import Channels, channel_values

CHUNK = 1024
"""Images decoded at once when a whole set is decoded: enough for the threads, few enough for the memory."""
THREADS = min(16, os.cpu_count() or 1)


class Images(Protocol):
    """Images of one size, with their targets.

    Attributes:
        targets: class indices (N,) int64 for classification; values (N, V) float32; masks (N, H, W) uint8; a sequence
            of N targets, `LazyTargets` if they are read on demand; or None.
        size: height and width in pixels.
        channels: C, 3 for RGB.
        largest: the value of full brightness, 255 for 8 bits per channel and 65,535 for 16.
    """

    targets: Any
    size: tuple[int, int]
    channels: int
    largest: int

    def __len__(self) -> int:
        """N."""
        ...

    def take(self, index: Tensor) -> Tensor:
        """Return the images at `index` (B,) as uint8 or uint16 (B, C, H, W); the same on every call."""
        ...

    def targets_at(self, index: Tensor) -> Any:
        """Return the targets at `index` (B,) as a batch has them: a pytree, or None."""
        ...


def class_numbers(images: Images) -> Tensor | None:
    """The targets of all images, if they are class indices (N,); else None."""
    targets = images.targets
    return targets if isinstance(targets, Tensor) and targets.ndim == 1 and targets.dtype == torch.int64 else None


def strata(images: Images) -> Tensor:
    """What splits are stratified by (N,): class indices, or a single stratum for other targets."""
    labels = class_numbers(images)
    return torch.zeros(len(images), dtype=torch.int64) if labels is None else labels


class LazyTargets(Sequence[Any]):
    """A sequence of targets that are read when they are needed.

    Args:
        count: N.
        read: number of an image -> its target; called from several threads if `threads` > 1.
        threads: number of targets read in parallel.
    """

    def __init__(self, count: int, read: Callable[[int], Any], threads: int = 1) -> None:
        self._count = count
        self._read = read
        self._threads = threads

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        return self._read(number)

    def at(self, numbers: Sequence[int]) -> list[Any]:
        """Read several targets."""
        if self._threads == 1:
            return [self._read(number) for number in numbers]
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(self._read, numbers))

    def selected(self, index: Tensor) -> LazyTargets:
        """The targets at `index` (M,), not read yet."""
        numbers = index.tolist()
        return LazyTargets(len(numbers), lambda number: self._read(numbers[number]), self._threads)


def targets_of(targets: Any, index: Tensor) -> Any:
    """Collate the targets at `index` (B,): masks as int64, tensors of equal shape stacked, anything else as a list.

    Args:
        targets: a tensor (N, ...), a sequence of N targets, or None.
        index: numbers of images.
    """
    found = _stored(targets, index)
    return found.long() if isinstance(found, Tensor) and found.dtype == torch.uint8 else found


def _stored(targets: Any, index: Tensor) -> Any:
    """The targets at `index`, in the data type in which they are kept."""
    if targets is None or isinstance(targets, Tensor):
        return None if targets is None else targets[index]
    numbers = index.tolist()
    found = targets.at(numbers) if isinstance(targets, LazyTargets) else [targets[number] for number in numbers]
    alike = all(isinstance(each, Tensor) and each.shape == found[0].shape for each in found)
    return torch.stack(found) if found and alike else found


class Pixels:
    """Images in memory.

    Args:
        pixels: (N, H, W, C) uint8 or uint16.
        targets: see `Images`.
    """

    def __init__(self, pixels: Tensor, targets: Any) -> None:
        assert pixels.dtype in {torch.uint8, torch.uint16}
        assert targets is None or len(pixels) == len(targets)
        self._pixels = pixels
        self.targets = targets
        self.size = (pixels.shape[1], pixels.shape[2])
        self.channels = pixels.shape[3]
        self.largest = torch.iinfo(pixels.dtype).max

    def __len__(self) -> int:
        return len(self._pixels)

    def take(self, index: Tensor) -> Tensor:
        """Return a copy (B, C, H, W) in channels_last order."""
        return self._pixels.index_select(0, index).permute(0, 3, 1, 2)

    def targets_at(self, index: Tensor) -> Any:
        """Return the targets at `index` (B,)."""
        return targets_of(self.targets, index)


class Decoded:
    """Images decoded on every call.

    Args:
        targets: see `Images`.
        read: number of an image -> its pixels (H, W, C) uint8 or uint16; called from several threads if `threads` > 1.
        threads: number of images decoded in parallel.
        count: N, where there are no targets.

    Raises:
        InputError: there is no image, or `read` raises it for the first one.
    """

    def __init__(
        self, targets: Any, read: Callable[[int], NDArray[Any]], threads: int = THREADS, *, count: int = 0
    ) -> None:
        self.targets: Any = targets
        self._count = count if targets is None else len(targets)
        if not self._count:
            raise InputError("a data set has no images. At least two training images and one test image are needed.")
        self._read = read
        self._threads = threads
        first = read(0)
        self.size = (first.shape[0], first.shape[1])
        self.channels = first.shape[2]
        self.largest = int(np.iinfo(first.dtype).max)
        self._dtype = first.dtype

    def __len__(self) -> int:
        return self._count

    def take(self, index: Tensor) -> Tensor:
        """Return uint8 or uint16 (B, C, H, W) in channels_last order.

        Raises:
            InputError: an image cannot be decoded, or its size or number of bits differs from the first one's.
        """
        numbers = index.tolist()
        pixels = np.empty((len(numbers), *self.size, self.channels), self._dtype)

        def decode(places: range) -> None:
            for place in places:
                pixels[place] = self._checked(self._read(numbers[place]))

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

    def _checked(self, image: NDArray[Any]) -> NDArray[Any]:
        height, width, _ = image.shape
        if (height, width) != self.size:
            raise InputError(
                f"the images differ in size: {self.size[1]}x{self.size[0]} and {width}x{height} pixels, for example. "
                "Resize them: write data.image_size: 224 in a recipe, --image-size 224, or image_size=224 in Python."
            )
        if image.dtype != self._dtype:
            raise InputError(
                f"some images have 8 and others 16 bits per channel (the first has {8 * self._dtype.itemsize}). "
                "Convert them to the same number."
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
        targets = images.targets
        self.targets = targets.selected(index) if isinstance(targets, LazyTargets) else _stored(targets, index)
        self.size = images.size
        self.channels = images.channels
        self.largest = images.largest

    def __len__(self) -> int:
        return len(self._index)

    def take(self, index: Tensor) -> Tensor:
        """Return uint8 or uint16 (B, C, H, W)."""
        return self._images.take(self._index[index])

    def targets_at(self, index: Tensor) -> Any:
        """Return the targets at `index` (B,)."""
        return self._images.targets_at(self._index[index])

    def joined(self, other: View) -> View:
        """Both selections, of the same set, as one."""
        return View(self._images, torch.cat([self._index, other._index]))


@dataclass(frozen=True)
class Splits:
    """Training, validation and test images with the same classes.

    Attributes:
        train: the images to train on.
        validation: the images for all choices, such as hyperparameters; may be empty.
        test: the images for the reported results; they are used for nothing else.
        classes: names of the classes, in the order of their numbers; names of the values if the targets are values.
        mean: mean of each channel in [0, 1]; subtracted from every pixel.
        std: standard deviation of each channel in [0, 1]; every pixel is then divided by it.
        test_is_drawn: whether the data has no test set of its own, so that a fifth of each class became the test set.

    Raises:
        InputError: mean or std is not a list of numbers.
    """

    train: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]
    mean: Channels | None = None
    std: Channels | None = None
    test_is_drawn: bool = False

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, channel_values(name, given))


def in_memory(images: Images) -> Pixels:
    """Decode all images and read all targets into memory."""
    if isinstance(images, Pixels):
        return images
    pixels = torch.empty((len(images), *images.size, images.channels), dtype=_DTYPES[images.largest])
    for start in range(0, len(images), CHUNK):
        index = torch.arange(start, min(start + CHUNK, len(images)))
        pixels[start : start + len(index)] = images.take(index).permute(0, 2, 3, 1)
    return Pixels(pixels, _stored(images.targets, torch.arange(len(images))))


_DTYPES = {255: torch.uint8, 65535: torch.uint16}


def bytes_in_memory(images: Images) -> int:
    """Size of the decoded images in bytes."""
    return len(images) * images.size[0] * images.size[1] * images.channels * _DTYPES[images.largest].itemsize
