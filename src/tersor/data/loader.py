"""A user's loader, whose batches are checked before training on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import chain
from typing import Any, cast

from torch import Tensor

from tersor.core.errors import InputError
from tersor.data.batch import Batch, images_of, parts_of
from tersor.data.batch_errors import labels_error
from tersor.data.network_inputs import NetworkInput


def unchecked_labels(batch: Any) -> Tensor | None:
    """Return the labels of a user's batch, if they are a tensor.

    Raises:
        InputError: they are a numpy array.
    """
    _, second = parts_of(batch)
    if type(second).__module__ == "numpy":
        raise InputError("the labels of a batch are a numpy array. Write torch.from_numpy(labels).")
    return second if isinstance(second, Tensor) else None


def batches_of(loader: Any, images: int | None = None) -> tuple[Iterable[Any], NetworkInput]:
    """Return batches that can be iterated more than once, and the images of the first.

    Args:
        loader: what a user passed as the loader; a tensor (N, C, H, W) is one batch. Batches of a generator are kept.
        images: number of images of a generator to keep; None for all.

    Raises:
        InputError: the loader has no batches.
    """
    if isinstance(loader, Tensor):
        loader = [loader]
    if isinstance(loader, tuple | list) and _is_a_batch(cast("list[Any]", loader)):
        raise InputError("a batch was passed as the loader. Pass a list of batches: [(images, labels)].")
    if isinstance(loader, str | dict) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise InputError(
            f"the loader is of type {type(loader).__name__}. Pass a DataLoader, or a list of batches (N, C, H, W)."
        )
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        raise InputError("the loader is empty. Pass a DataLoader, or a list, with batches of images (N, C, H, W).")
    first_images = images_of(first)
    if not len(first_images):
        raise InputError(f"the first batch has no image (shape {tuple(first_images.shape)}). Leave empty batches out.")
    return (_first_batches(chain([first], batches), images) if batches is loader else loader), first_images


def _is_a_batch(pair: list[Any]) -> bool:
    """Whether `pair` is one batch, images and labels, instead of a list of batches."""
    return len(pair) == 2 and all(isinstance(each, Tensor) for each in pair) and pair[0].ndim > 3 and pair[1].ndim < 4


def _first_batches(batches: Iterable[Any], images: int | None) -> list[Any]:
    kept: list[Any] = []
    count = 0
    for batch in batches:
        kept.append(batch)
        count += len(images_of(batch))
        if images is not None and count >= images:
            break
    return kept


_TARGETS = ("targets", "target", "labels", "label", "masks", "mask")


def targets_in(batch: Any) -> Any:
    """Return the targets of a user's batch, whatever they are; None where there are none.

    In a tuple they are the second entry. In a mapping they have one of the keys `targets`, `labels` or `masks`, in
    singular or plural, or are the only value besides the images.
    """
    if isinstance(batch, Mapping):
        entries = cast("Mapping[Any, Any]", batch)
        others = [value for value in entries.values() if getattr(value, "ndim", None) != 4]
        found = next((entries[key] for key in _TARGETS if key in entries), others[0] if len(others) == 1 else None)
    else:
        _, found = parts_of(batch)
    if type(found).__module__ == "numpy":
        raise InputError("the targets of a batch are a numpy array. Write torch.from_numpy(targets).")
    return found


class Loader:
    """A `BatchSource` over a user's loader, which shuffles by itself.

    Args:
        loader: has a length; batches are (images, targets), or images alone.
        classes: number of classes, if the targets are class indices; None otherwise.
        targets: whether targets that are not class indices are needed.
    """

    def __init__(self, loader: Iterable[Any], classes: int | None, *, targets: bool = False) -> None:
        self.loader = loader
        self.classes = classes
        self.targets = targets
        self._least: int | None = None

    def __len__(self) -> int:
        assert isinstance(self.loader, Sized)
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            images = images_of(batch)
            if not len(images):
                raise InputError("a batch of the data is empty. Leave empty batches out.")
            if not images.is_floating_point():
                raise InputError(
                    f"a batch of the data has the type {images.dtype}. Pass normalized floating-point images."
                )
            yield Batch(images, self._targets(batch, len(images)))

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch to a sampler that depends on it, as in distributed runs."""
        set_epoch = getattr(getattr(self.loader, "sampler", None), "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)

    def _targets(self, batch: Any, images: int) -> Any:
        if self.classes is not None:
            labels = unchecked_labels(batch)
            if labels is None and isinstance(found := targets_in(batch), list | tuple):
                raise InputError(
                    f"the labels of a batch are of type {type(found).__name__}. Write torch.tensor(labels)."
                )
            return self._checked(labels, images)
        found = targets_in(batch) if self.targets else None
        if self.targets and found is None:
            raise InputError("a batch has no targets. Pass batches (images, targets), or label_weight=0.")
        return found

    def _checked(self, labels: Tensor | None, images: int) -> Tensor:
        """Return valid labels (N,) as int64."""
        if labels is None:
            raise InputError("a batch has no labels. Pass batches (images, labels), or label_weight=0.")
        error = labels_error(labels, images, self.classes, self._least)
        if error is not None:
            raise error
        low = int(labels.min())
        self._least = low if self._least is None else min(self._least, low)
        return labels.long()
