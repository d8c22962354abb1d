"""A user's own loader: its batches are checked before they are trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from itertools import chain
from typing import Any, cast

from torch import Tensor

from tersor.core.errors import InputError
from tersor.data.batch import Batch, images_of
from tersor.data.batch_errors import wrong_labels


def given_labels(batch: Any) -> Tensor | None:
    """What lies where labels should, unchecked.

    Raises:
        InputError: it is a numpy array.
    """
    if isinstance(batch, Batch):
        return batch.labels
    second = cast("Any", batch[1]) if isinstance(batch, list | tuple) and len(cast("list[Any]", batch)) > 1 else None
    if type(second).__module__ == "numpy":
        raise InputError("the labels of a batch are a numpy array. Write torch.from_numpy(labels).")
    return second if isinstance(second, Tensor) else None


def batches_of(given: Any, images: int | None = None) -> tuple[Iterable[Any], Tensor]:
    """Batches that can be iterated more than once, and the images of the first: those of a generator are kept.

    Args:
        given: what a user passed as loader; one tensor (N, C, H, W) is one batch.
        images: how many of a generator's are kept; None for all.

    Raises:
        InputError: it holds no batches, or not a single one.
    """
    if isinstance(given, Tensor):
        given = [given]
    if isinstance(given, tuple | list) and _is_a_batch(cast("list[Any]", given)):
        raise InputError("a batch was given as the loader. Pass a list of batches: [(images, labels)].")
    if isinstance(given, str | dict) or not (hasattr(given, "__iter__") or hasattr(given, "__getitem__")):
        raise InputError(
            f"the loader is of type {type(given).__name__}. Pass a DataLoader, or a list of batches (N, C, H, W)."
        )
    batches = iter(given)
    first = next(batches, None)
    if first is None:
        raise InputError("the loader is empty. Pass a DataLoader, or a list, with batches of images (N, C, H, W).")
    seen = images_of(first)
    if not len(seen):
        raise InputError(
            f"the first batch is empty: it has no image (shape {tuple(seen.shape)}). Leave empty ones out."
        )
    return (_kept(chain([first], batches), images) if batches is given else given), seen


def _is_a_batch(given: list[Any]) -> bool:
    """Whether this is images and their labels, where batches were asked for."""
    return len(given) == 2 and all(isinstance(each, Tensor) for each in given) and given[0].ndim == 4 > given[1].ndim


def _kept(batches: Iterable[Any], images: int | None) -> list[Any]:
    kept: list[Any] = []
    count = 0
    for batch in batches:
        kept.append(batch)
        count += len(images_of(batch))
        if images is not None and count >= images:
            break
    return kept


class Loader:
    """A user's loader as the loop takes it: batches that it makes anew for every epoch, in an order of its own.

    Args:
        loader: with a length; batches (images, labels), or of images alone.
        classes: how many there are; None where labels are not asked for.
    """

    def __init__(self, loader: Iterable[Any], classes: int | None) -> None:
        self.loader = loader
        self.classes = classes
        self._least: int | None = None

    def __len__(self) -> int:
        assert isinstance(self.loader, Sized)
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            images = images_of(batch)
            if not len(images):
                raise InputError("a batch of the data is empty. Leave empty ones out.")
            if not images.is_floating_point():
                raise InputError(f"a batch of the data is of {images.dtype}. Pass normalised images in floating point.")
            yield Batch(images, None if self.classes is None else self._checked(given_labels(batch), len(images)))

    def set_epoch(self, epoch: int) -> None:
        """A sampler that heeds the epoch (of a distributed run) is told; any other draws its own order."""
        tell = getattr(getattr(self.loader, "sampler", None), "set_epoch", None)
        if callable(tell):
            tell(epoch)

    def _checked(self, labels: Tensor | None, images: int) -> Tensor:
        """Labels (N,) as int64."""
        if labels is None:
            raise InputError("a batch has no labels. Give batches (images, labels), or write label_weight=0.")
        error = wrong_labels(labels, images, self.classes, self._least)
        if error is not None:
            raise error
        low = int(labels.min())
        self._least = low if self._least is None else min(self._least, low)
        return labels.long()
