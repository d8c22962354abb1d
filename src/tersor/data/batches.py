"""Batches of normalized images. The seed and the epoch alone determine their order and augmentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from tersor.core.errors import InputError, counted
from tersor.data.augmentation import Augmentation, Named, Transform, augmented, resolve
from tersor.data.batch import Batch
from tersor.data.image_sets import Images, Pixels
from tersor.data.mean_and_std import channel_values
from tersor.data.stratified import generator

T = TypeVar("T")
_Decoded = tuple[Tensor, Any, Tensor, torch.Generator]
_ORDER, _AUGMENTATION = 0, 1  # the streams of random numbers of an epoch


class Batches:
    """The batches of one epoch.

    Iterating again yields the same batches; `set_epoch` selects another order and augmentation.

    Without `shuffle`, every image occurs once and the last batch may be smaller. With `shuffle`, an incomplete last
    batch is dropped unless it is the only one, so that BatchNorm never normalizes over a few images only. In a
    distributed run, processes get different images and the same number of batches.

    Args:
        images: the images.
        batch_size: images per batch and process.
        mean: mean of each channel in [0, 1].
        std: standard deviation of each channel in [0, 1].
        shuffle: whether every epoch has a new order.
        seed: 0 or more; determines order and augmentation together with the epoch.
        augment: "none"; "flip"; "crop_flip"; classes of torchvision.transforms.v2 with their arguments, such as
            [{"RandomCrop": {"size": 32, "padding": 4}}, "RandomHorizontalFlip"]; a callable: uint8 images
            (B, C, H, W) -> the same shape and data type; or "package.module:function" that names one. Transforms of
            torchvision are called for each image with its mask or boxes. A callable gets (images, targets) and returns
            both if the targets are masks or boxes. Every augmentation is first tried on a black image.
        rank: number of this process.
        world: number of processes.

    Raises:
        InputError: batch_size is below 1, the augmentation is unknown or changes shape or data type, mean or std do not
            have one number for each channel, there are fewer images than processes, or batches of one image cannot be
            divided evenly among the processes.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        shuffle: bool = False,
        seed: int = 0,
        augment: Augmentation = "none",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert 0 <= rank < world
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}. Write 1 or more.")
        if 0 < len(images) < world:
            given = f"{world} processes need at least {world} images; given: {len(images)}"
            raise InputError(f"{given}. Start fewer processes.")
        if batch_size == 1 and not shuffle and len(images) % world:
            raise InputError(
                f"{len(images)} images cannot be divided evenly among {world} processes in batches of one image. Write "
                "batch_size 2."
            )
        mean, std = channel_values("mean", mean), channel_values("std", std)
        if not len(mean) == len(std) == images.channels:
            raise InputError(
                f"mean has {counted(len(mean), 'number')}, std has {counted(len(std), 'number')}, and the images have "
                f"{counted(images.channels, 'channel')}. Both need one number per channel."
            )
        self.images = images
        self.batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._augmentation: Named | Transform = resolve(augment)
        self._try_augmentation()
        self._rank = rank
        self._world = world
        self._epoch = 0
        # repeated for every pixel: arithmetic over rows of three does not fill a vector register
        pixels = images.size[0] * images.size[1]
        self._mean = images.largest * torch.tensor(mean, dtype=torch.float32).repeat(pixels)
        self._std = images.largest * torch.tensor(std, dtype=torch.float32).repeat(pixels)

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Batches per epoch and process."""
        everyone = self.batch_size * self._world
        full = len(self.images) // everyone
        return full if self._shuffle and full else -(-len(self.images) // everyone)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._epoch
        decoded = (self._decoded(epoch, number, index) for number, index in enumerate(self._order(epoch)))
        if isinstance(self.images, Pixels):
            yield from map(self._finished, decoded)
            return
        with ThreadPoolExecutor(1) as worker:
            if callable(self._augmentation):  # it draws from the global generator, which the training thread uses too
                yield from map(self._finished, _one_ahead(worker, decoded))
            else:
                yield from _one_ahead(worker, map(self._finished, decoded))

    def take(self, index: Tensor) -> Batch:
        """Return the images at `index` (B,), normalized and not augmented."""
        pixels = self.images.take(index).permute(0, 2, 3, 1).contiguous()
        return self._normalized(pixels, self.images.targets_at(index), index)

    def _try_augmentation(self) -> None:
        """Call the augmentation once, so that a wrong one fails before the training."""
        if self._augmentation != "none" and len(self.images):
            index = torch.arange(1)
            black = torch.zeros_like(self.images.take(index).permute(0, 2, 3, 1).contiguous())
            augmented(black, self.images.targets_at(index), self._augmentation, generator(self._seed))

    def _order(self, epoch: int) -> Sequence[Tensor]:
        """The indices of the images of each batch of this process."""
        count, everyone = len(self.images), self.batch_size * self._world
        if not count:
            return ()
        order = torch.arange(count)
        if self._shuffle:
            order = torch.randperm(count, generator=generator(self._seed, epoch, _ORDER))
            order = order[: count // everyone * everyone or count]
        batches = order[self._rank :: self._world].split(self.batch_size)
        # if too few images are left for one more batch in every process, each divides its images evenly
        return batches if len(batches) == len(self) else order[self._rank :: self._world].tensor_split(len(self))

    def _decoded(self, epoch: int, number: int, index: Tensor) -> _Decoded:
        # a generator for each batch, so that a batch does not depend on the batches before it
        draw = generator(self._seed, epoch, _AUGMENTATION, self._rank, number)
        pixels = self.images.take(index).permute(0, 2, 3, 1).contiguous()
        return pixels, self.images.targets_at(index), index, draw

    def _finished(self, decoded: _Decoded) -> Batch:
        pixels, targets, index, draw = decoded
        return self._normalized(*augmented(pixels, targets, self._augmentation, draw), index)

    def _normalized(self, pixels: Tensor, targets: Any, index: Tensor) -> Batch:
        """Pixels (B, H, W, C) uint8 or uint16 and targets -> a batch."""
        values = pixels.view(len(index), -1).to(torch.float32).sub_(self._mean).div_(self._std)
        return Batch(values.view(pixels.shape).permute(0, 3, 1, 2), targets, index)


def _one_ahead(worker: ThreadPoolExecutor, items: Iterator[T]) -> Iterator[T]:
    """Yield the items; `worker` makes the next one meanwhile."""
    following = worker.submit(next, items, None)
    while (item := following.result()) is not None:
        following = worker.submit(next, items, None)
        yield item
