"""Data sets by name: the bundled ones, those of torchvision, and those that a user's function returns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tersor.core.errors import InputError, unknown, without_function
from tersor.core.import_path import call_with, import_function, is_function_path
from tersor.data.dataset_items import ItemSet, class_names, described
from tersor.data.decoding import ImageFormat, pixels_of
from tersor.data.image_sets import THREADS, Decoded, LazyTargets, Pixels, Splits, View
from tersor.data.scenes import CLASSES, SIDE, TEST, TRAIN, Scenes
from tersor.data.splitting import none_of
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

BUNDLED = ("digits", "scenes")
DIGITS_TEST_SHARE = 0.2
_DIGITS_TEST_SEED = 0

SMALLEST = 32
"""Shortest side of a scene in pixels."""

_SETS = "a dict of train, test and, if there is one, validation, such as a Hugging Face DatasetDict"

SceneTargets = Literal["masks", "boxes"]


def from_name(name: str, root: Path | None, form: ImageFormat, targets: SceneTargets = "masks") -> Splits:
    """Load `digits`, `scenes`, one of `TORCHVISION` (case is ignored), or what `package.module:function` returns.

    Raises:
        InputError: the name is unknown, the files are not under `root`, or the function returns anything else.
    """
    if is_function_path(name):
        return _from_function(name, root, form)
    by_name = {known.lower(): known for known in TORCHVISION}
    if name.lower() in by_name:
        return _from_torchvision(by_name[name.lower()], root, form)
    if name.endswith(".py"):
        raise without_function(name, "a function that returns the images")
    if name.lower() not in BUNDLED:
        if "/" in name and not Path(name).is_dir():
            raise InputError(f"there is no folder '{name}' in {Path.cwd()}. Correct the path.")
        error = unknown("data name", name.lower(), [*BUNDLED, *by_name, "package.module:function"])
        advice = (
            f"To read the folder '{name}', write folder: {name}"
            if Path(name).is_dir()
            else f"There is no folder '{name}'"
        )
        raise InputError(f"{error} {advice}.")
    if root is not None:
        raise InputError(f"the {name} are made from scikit-learn's data and need no root. Leave root out.")
    return _digits(form) if name.lower() == "digits" else _scenes(form, targets)


def _digits(form: ImageFormat) -> Splits:
    """1,797 handwritten digits of 8x8 pixels; the test set is a fifth, always the same."""
    _, labels, test, train = _divided_digits()
    small = form.size is None
    everything = Pixels(_digit_pixels(form), labels) if small else Decoded(labels, lambda number: _digit(number, form))
    classes = tuple(str(digit) for digit in range(10))
    return Splits(View(everything, train), none_of(everything), View(everything, test), classes)


@functools.cache
def _digit_pixels(form: ImageFormat) -> Tensor:
    """All digits (N, H, W, C): in 8x8 pixels they fit in memory."""
    count = len(_divided_digits()[1])
    return torch.from_numpy(np.stack([_digit(number, form) for number in range(count)]))


def _digit(number: int, form: ImageFormat) -> NDArray[np.uint8]:
    ink = _divided_digits()[0][number]
    return pixels_of(Image.fromarray(np.round(ink * 255).astype(np.uint8)), form, "a digit")


@functools.cache
def _divided_digits() -> tuple[NDArray[np.float64], Tensor, Tensor, Tensor]:
    """The ink (N, 8, 8) in [0, 1], the labels (N,), and the numbers of the test and of the training digits.

    Cached because scikit-learn stores them as text.
    """
    from sklearn.datasets import load_digits  # imported here because it takes a second

    data = cast("Any", load_digits())
    labels = torch.from_numpy(data.target).to(torch.int64)
    count = round(DIGITS_TEST_SHARE * len(labels))
    test, train = stratified(labels, count, generator(_DIGITS_TEST_SEED))
    return data.images / 16, labels, test, train


def _scenes(form: ImageFormat, targets: SceneTargets) -> Splits:
    """2,000 training and 500 test scenes of digits (see `scenes`), always the same for a size."""
    ink, labels, *divided = _divided_digits()
    size = form.size or (SIDE, SIDE)
    if min(size) < SMALLEST:
        raise InputError(
            f"image_size is {min(size)}. Write at least {SMALLEST} for scenes: smaller digits are illegible."
        )
    sets = [Scenes(ink[index.numpy()], labels[index].numpy(), size, seed) for seed, index in enumerate(divided)]
    test, train = (
        _scene_images(scenes, count, form, targets) for scenes, count in zip(sets, (TEST, TRAIN), strict=True)
    )
    return Splits(train, none_of(train), test, CLASSES)


def _scene_images(scenes: Scenes, count: int, form: ImageFormat, targets: SceneTargets) -> Decoded:
    def boxes(number: int) -> dict[str, Tensor]:
        scene = scenes[number]
        return {"boxes": torch.from_numpy(scene.boxes), "labels": torch.from_numpy(scene.labels)}

    read = boxes if targets == "boxes" else lambda number: torch.from_numpy(scenes[number].mask)
    return Decoded(
        LazyTargets(count, read),
        lambda number: pixels_of(Image.fromarray(scenes[number].pixels), form, "a scene"),
        threads=1,
    )


def _from_torchvision(name: str, root: Path | None, form: ImageFormat) -> Splits:
    from torchvision import datasets  # imported here because it takes a second

    if root is None:
        raise InputError(
            f"data '{name}' needs the folder of torchvision's files. Write root: FOLDER in a recipe, or root=FOLDER in "
            "tersor.data.load. For tersor compress and eval, write --data file.py:function, with a function that "
            f"returns tersor.data.load(name='{name}', root=FOLDER)."
        )
    make = cast("Callable[..., Any]", getattr(datasets, name))
    try:
        train, test = (make(root=str(root), **options) for options in TORCHVISION[name])
    except (RuntimeError, OSError) as error:
        raise InputError(f"'{name}' cannot be loaded from '{root}'. {_how_to_get(name, root)} ({error})") from error
    return from_datasets(name, {"train": train, "test": test}, form, THREADS)


def _how_to_get(name: str, root: Path) -> str:
    if name == "ImageNet":
        return (
            "Put ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar there; the download "
            "needs an account."
        )
    calls = (
        f"{name}({str(root)!r}, {', '.join(f'{key}={value!r}' for key, value in options.items())}, download=True)"
        for options in TORCHVISION[name]
    )
    return f'Get it with: python -c "from torchvision.datasets import {name}; {"; ".join(calls)}"'


def _from_function(path: str, root: Path | None, form: ImageFormat) -> Splits:
    returned = call_with(path, import_function(path), **({} if root is None else {"root": str(root)}))
    if isinstance(returned, Splits):
        return returned
    if isinstance(returned, tuple | list) and len(returned) == 2:
        returned = {"train": returned[0], "test": returned[1]}
    if not isinstance(returned, Mapping):
        raise InputError(
            f"'{path}' returned {described(returned)}. Return a tersor.data.Splits, a pair (train, test) of torch "
            f"Datasets, or {_SETS}."
        )
    # one thread, because a user's data set may not be thread-safe
    return from_datasets(path, cast("Mapping[str, Any]", returned), form, threads=1)


def from_datasets(name: str, datasets: Mapping[str, Any], form: ImageFormat, threads: int) -> Splits:
    """Load data sets of images and targets (see `ItemSet`).

    Args:
        name: name of the data in error messages.
        datasets: "train", "test" and perhaps "validation"; each has a length and items by number.
        form: size and channels of the images.
        threads: number of images decoded in parallel.

    Raises:
        InputError: a data set is empty, or its items are something else.
    """
    if not {"train", "test"} <= {*datasets}:
        raise InputError(f"{name} has the sets {', '.join(datasets) or '(none)'}. Possible: {_SETS}.")
    words = {"train": "training", "test": "test", "validation": "validation"}
    sets = {
        which: ItemSet(f"{name}, {word} set", datasets[which]) for which, word in words.items() if which in datasets
    }
    kind = sets["train"].kind()
    images = {which: each.images(kind, form, threads) for which, each in sets.items()}
    classes = class_names([*images.values()], kind, datasets["train"])
    return Splits(images["train"], images.get("validation") or none_of(images["train"]), images["test"], classes)
