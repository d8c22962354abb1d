"""Images -> normalised batches, in an order and with an augmentation that (seed, epoch) alone decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from tersor.core.errors import InputError, unknown
from tersor.data.augmentation import AUGMENTATIONS, Augmentation, augmented
from tersor.data.batch import Batch
from tersor.data.image_sets import Images, Pixels
from tersor.data.stratified import generator

_ORDER, _AUGMENTATION = 0, 1  # the streams of random numbers of an epoch


class Batches:
    """An epoch of batches, as often as it is iterated; `set_epoch` for another order.

    Without `shuffle`, every image comes once and the last batch may be smaller. With it, the last one is left out
    where there is at least one full batch, so that BatchNorm never sees a handful of images. Every process of a
    distributed run gets its own images and the same number of batches.

    Args:
        images: what to take from.
        batch_size: images a batch and process.
        mean: of red, green and blue in [0, 1].
        std: of red, green and blue in [0, 1].
        shuffle: a new order in every epoch.
        seed: 0 or more; with the epoch, it decides order and augmentation.
        augment: "none", "flip" or "crop_flip" (see `augmentation`).
        rank: number of this process.
        world: number of processes.

    Raises:
        InputError: batch_size below 1, no such augmentation, fewer images than processes, or images that cannot be
            shared out one by one.
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
        if augment not in AUGMENTATIONS:
            raise unknown("augmentation", augment, AUGMENTATIONS)
        if 0 < len(images) < world:
            raise InputError(f"{len(images)} images for {world} processes. Start at most {len(images)} processes.")
        if batch_size == 1 and not shuffle and len(images) % world:
            raise InputError(f"{len(images)} images one by one for {world} processes do not come out even. Write 2.")
        self.images = images
        self.batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._augment: Augmentation = augment
        self._rank = rank
        self._world = world
        self._epoch = 0
        # one number for every pixel and channel: arithmetic over rows of three does not fill a vector register
        pixels = images.size[0] * images.size[1]
        self._mean = 255 * torch.tensor(mean, dtype=torch.float32).repeat(pixels)
        self._std = 255 * torch.tensor(std, dtype=torch.float32).repeat(pixels)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is the one of `epoch`."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Batches an epoch and process."""
        everyone = self.batch_size * self._world
        full = len(self.images) // everyone
        return full if self._shuffle and full else -(-len(self.images) // everyone)

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._epoch
        order = enumerate(self._order(epoch))
        if isinstance(self.images, Pixels):
            for number, index in order:
                yield self._batch(epoch, number, index)
            return
        # decoding takes long: it goes on in a thread while the batch before is worked on
        with ThreadPoolExecutor(1) as decoder:
            ahead: Future[Batch] | None = None
            for number, index in order:
                following = decoder.submit(self._batch, epoch, number, index)
                if ahead is not None:
                    yield ahead.result()
                ahead = following
            if ahead is not None:
                yield ahead.result()

    def take(self, index: Tensor) -> Batch:
        """The images at `index` (B,), normalised and not augmented."""
        return self._normalised(self.images.take(index).permute(0, 2, 3, 1).contiguous(), index)

    def _order(self, epoch: int) -> Sequence[Tensor]:
        """The places of the images of each batch of this process."""
        count, everyone = len(self.images), self.batch_size * self._world
        if not count:
            return ()
        order = torch.arange(count)
        if self._shuffle:
            order = torch.randperm(count, generator=generator(self._seed, epoch, _ORDER))
            order = order[: count // everyone * everyone or count]
        batches = order[self._rank :: self._world].split(self.batch_size)
        # the last images may not suffice for a batch of every process: those without one share theirs out anew
        return batches if len(batches) == len(self) else order[self._rank :: self._world].tensor_split(len(self))

    def _batch(self, epoch: int, number: int, index: Tensor) -> Batch:
        # a generator for each batch: what one batch draws does not depend on the batches before
        draw = generator(self._seed, epoch, _AUGMENTATION, self._rank, number)
        pixels = augmented(self.images.take(index).permute(0, 2, 3, 1).contiguous(), self._augment, draw)
        return self._normalised(pixels, index)

    def _normalised(self, pixels: Tensor, index: Tensor) -> Batch:
        """Pixels (B, H, W, 3) uint8 -> a batch."""
        values = pixels.view(len(index), -1).to(torch.float32).sub_(self._mean).div_(self._std)
        return Batch(values.view(pixels.shape).permute(0, 3, 1, 2), self.images.labels[index], index)
