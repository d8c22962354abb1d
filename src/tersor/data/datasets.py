"""Data sets by name: the digits of scikit-learn, those of torchvision, and those that a user's function returns."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tersor.core.errors import InputError, unknown
from tersor.core.import_path import call_with, import_function, is_function_path
from tersor.data.decoding import rgb
from tersor.data.image_sets import THREADS, Decoded, Splits, View
from tersor.data.stratified import generator, stratified

_TRAIN: dict[str, Any] = {"train": True}
_TEST: dict[str, Any] = {"train": False}
TORCHVISION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "CIFAR10": (_TRAIN, _TEST),
    "CIFAR100": (_TRAIN, _TEST),
    "FashionMNIST": (_TRAIN, _TEST),
    "ImageNet": ({"split": "train"}, {"split": "val"}),
    "KMNIST": (_TRAIN, _TEST),
    "MNIST": (_TRAIN, _TEST),
    "STL10": ({"split": "train"}, {"split": "test"}),
    "SVHN": ({"split": "train"}, {"split": "test"}),
    "USPS": (_TRAIN, _TEST),
}
"""Class -> its arguments for the training set and for the test set. All list their labels without decoding images."""

DIGITS_TEST_SHARE = 0.2
_DIGITS_TEST_SEED = 0


def from_name(name: str, root: Path | None, image_size: int | None) -> Splits:
    """Load `digits`, one of `TORCHVISION` (case is ignored), or what `package.module:function` returns.

    Raises:
        InputError: the name is unknown, the files are not under `root`, or the function returns anything else.
    """
    if is_function_path(name):
        return _from_function(name, root, image_size)
    by_name = {known.lower(): known for known in TORCHVISION}
    if name.lower() in by_name:
        return _from_torchvision(by_name[name.lower()], root, image_size)
    if name.lower() != "digits":
        raise unknown("data name", name.lower(), ["digits", *by_name, "package.module:function"])
    if root is not None:
        raise InputError("the digits are part of scikit-learn and need no root. Leave root out.")
    return _digits(image_size)


def _digits(image_size: int | None) -> Splits:
    """1,797 handwritten digits of 8x8 pixels; the test set is a fifth, always the same."""
    gray, labels = _parsed_digits()
    everything = Decoded(labels, lambda number: rgb(Image.fromarray(gray[number]), image_size, "a digit"))
    count = round(DIGITS_TEST_SHARE * len(labels))
    test, train = stratified(labels, count, generator(_DIGITS_TEST_SEED))
    classes = tuple(str(digit) for digit in range(10))
    return Splits(View(everything, train), View(everything, torch.arange(0)), View(everything, test), classes)


@functools.cache
def _parsed_digits() -> tuple[NDArray[np.uint8], Tensor]:
    """Pixels (1797, 8, 8) and labels (1797,); cached because scikit-learn stores them as text."""
    from sklearn.datasets import load_digits  # imported here because it takes a second

    data = cast("Any", load_digits())
    return np.round(data.images * (255 / 16)).astype(np.uint8), torch.from_numpy(data.target).to(torch.int64)


def _from_torchvision(name: str, root: Path | None, image_size: int | None) -> Splits:
    from torchvision import datasets  # imported here because it takes a second

    if root is None:
        raise InputError(f"data '{name}' needs root, the folder of torchvision's files.")
    make = cast("Callable[..., Any]", getattr(datasets, name))
    try:
        train, test = (make(root=str(root), **options) for options in TORCHVISION[name])
    except (RuntimeError, OSError) as error:
        raise InputError(f"'{name}' cannot be loaded from '{root}'. {_how_to_get(name, root)} ({error})") from error
    return _from_pair(name, train, test, image_size, THREADS)


def _how_to_get(name: str, root: Path) -> str:
    if name == "ImageNet":
        return "Put ILSVRC2012_devkit_t12.tar.gz, _img_train.tar and _img_val.tar there; the download needs an account."
    calls = (
        f"{name}({str(root)!r}, {', '.join(f'{key}={value!r}' for key, value in options.items())}, download=True)"
        for options in TORCHVISION[name]
    )
    return f'Get it with: python -c "from torchvision.datasets import {name}; {"; ".join(calls)}"'


def _from_function(path: str, root: Path | None, image_size: int | None) -> Splits:
    returned = call_with(path, import_function(path), **({} if root is None else {"root": str(root)}))
    if isinstance(returned, Splits):
        return returned
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise InputError(
            f"'{path}' returned {_described(returned)}. Return a tersor.data.Splits, or a pair (train, test) of torch "
            "Datasets of (PIL image or uint8 tensor, class number)."
        )
    # a user's data set may not be thread-safe
    return _from_pair(path, returned[0], returned[1], image_size, threads=1)


def _described(value: object) -> str:
    length = f" of length {len(value)}" if isinstance(value, tuple | list) else ""
    return f"a {type(value).__name__}{length}"


def _from_pair(name: str, train: Any, test: Any, image_size: int | None, threads: int) -> Splits:
    sets = [
        _from_dataset(f"{name}, {which} set", dataset, image_size, threads)
        for which, dataset in (("training", train), ("test", test))
    ]
    count = 1 + int(max(images.labels.max() for images in sets))
    names = getattr(train, "classes", None) or range(count)
    classes = tuple(", ".join(each) if isinstance(each, tuple) else str(each) for each in names)
    return Splits(sets[0], View(sets[0], torch.arange(0)), sets[1], classes)


def _from_dataset(name: str, dataset: Any, image_size: int | None, threads: int) -> Decoded:
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or not len(dataset):
        raise InputError(
            f"{name}: a {type(dataset).__name__} that is empty or has no length. Return a torch Dataset with a length."
        )
    labels = _labels(name, dataset)

    def read(number: int) -> NDArray[np.uint8]:
        image, label = _item(name, dataset, number)
        if label != labels[number]:
            raise InputError(f"{name}: image {number} has label {label}, but had label {int(labels[number])} before.")
        return rgb(image, image_size, f"{name}: image {number}")

    return Decoded(labels, read, threads)


def _labels(name: str, dataset: Any) -> Tensor:
    """The labels that the data set lists, as torchvision's do; otherwise every item is loaded."""
    for attribute in ("targets", "labels"):
        listed = getattr(dataset, attribute, None)
        if listed is not None and len(listed) == len(dataset) and getattr(dataset, "target_transform", None) is None:
            return _class_numbers(f"{name}: {attribute}", np.asarray(listed))
    return torch.tensor([_item(name, dataset, number)[1] for number in range(len(dataset))])


def _class_numbers(what: str, listed: NDArray[Any]) -> Tensor:
    """Labels (N,) as int64."""
    if listed.ndim != 1 or listed.dtype.kind not in "iu":
        advice = "Write labels.argmax(1)" if listed.ndim > 1 and listed.shape[-1] > 1 else "Convert them"
        raise InputError(
            f"{what} have the data type {listed.dtype} and the shape {listed.shape}. Possible: class numbers "
            f"({len(listed)},), integers from 0. {advice}."
        )
    return torch.from_numpy(listed.astype(np.int64))


def _item(name: str, dataset: Any, number: int) -> tuple[object, int]:
    item = dataset[number]
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise InputError(
            f"{name}: item {number} is {_described(item)}. Possible: (PIL image or uint8 tensor, class number)."
        )
    try:
        return item[0], operator.index(item[1])
    except TypeError as error:
        raise InputError(
            f"{name}: the label of item {number} is a {type(item[1]).__name__}. Possible: a class number (int)."
        ) from error
