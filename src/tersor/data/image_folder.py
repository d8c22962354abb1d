"""Folders of image files with one subfolder per class."""

# Not torchvision's ImageFolder, which takes hidden folders for classes and files such as "._1.png" for images.

from __future__ import annotations

import os
from pathlib import Path

import torch

from tersor.core.errors import InputError
from tersor.data.decoding import SUFFIXES, read_file
from tersor.data.image_sets import Decoded, Splits, View
from tersor.data.stratified import generator, stratified

TEST_SHARE = 0.2
_TEST_SEED = 0


def from_folder(folder: Path, image_size: int | None) -> Splits:
    """Load the images of `folder/{train,test}/<class>/`, at any depth below the class.

    `val` is the test set if there is no `test`, and the validation set otherwise. A folder that holds only `<class>/`
    subfolders is split: the test set is a fifth of every class, always the same. Classes are numbered in the order of
    their names. Hidden files and files without an image suffix are ignored.

    Raises:
        InputError: the folder, `train` or `test` does not exist, a class has no image, the classes of the sets differ,
            or the first image cannot be decoded.
    """
    if not folder.is_dir():
        problem = "is a file. Unpack it" if folder.exists() else "does not exist. Correct the path"
        raise InputError(f"data folder '{folder}' {problem}. Expected: folder/{{train,test}}/<class>/*.jpg.")
    names = {child.name for child in folder.iterdir() if child.is_dir()} & {"train", "val", "test"}
    # a "train" folder that holds images may be a class, beside "bus" and "car"
    if not names or (names == {"train"} and not _subfolders(folder / "train")):
        return _split_off_test_set(_class_files(folder), folder, image_size)
    if "train" not in names:
        raise InputError(f"'{folder}' holds {' and '.join(sorted(names))}, but no 'train'. Add train/<class>/*.jpg.")
    if names == {"train"}:
        raise InputError(
            f"'{folder}' holds 'train', but neither 'test' nor 'val'. Add test/<class>/*.jpg, or write "
            f"'{folder}/train' as the folder, and it will be split."
        )
    train_files = _class_files(folder / "train")
    classes = tuple(train_files)
    test = _set_of(classes, folder / ("test" if "test" in names else "val"), image_size)
    missing = [name for number, name in enumerate(classes) if not (test.targets == number).any()]
    if missing:
        raise InputError(
            f"the test set of '{folder}' lacks {len(missing)} of the {len(classes)} classes: "
            f"{', '.join(missing[:5])}. Add test images of them, or remove the classes from train."
        )
    train = _images(classes, train_files, image_size)
    if names == {"train", "val", "test"}:
        validation = _set_of(classes, folder / "val", image_size)
    else:
        validation = View(train, torch.arange(0))
    return Splits(train, validation, test, classes)


def _split_off_test_set(files: dict[str, list[str]], folder: Path, image_size: int | None) -> Splits:
    for name, paths in files.items():
        if len(paths) < 2:
            raise InputError(
                f"class folder '{folder / name}' holds a single image, so no test image can be split off. "
                "Add images, or split them yourself into folder/{train,test}/<class>/."
            )
    images = _images(tuple(files), files, image_size)
    count = max(len(files), round(TEST_SHARE * len(images)))
    test, train = stratified(images.targets, count, generator(_TEST_SEED), at_least=1, leave=1)
    return Splits(View(images, train), View(images, torch.arange(0)), View(images, test), tuple(files))


def _set_of(classes: tuple[str, ...], folder: Path, image_size: int | None) -> Decoded:
    files = _class_files(folder)
    extra = [name for name in files if name not in classes]
    if extra:
        raise InputError(
            f"'{folder}' holds classes that 'train' lacks: {', '.join(extra[:5])}. Possible: {', '.join(classes)}."
        )
    return _images(classes, files, image_size)


def _images(classes: tuple[str, ...], files: dict[str, list[str]], image_size: int | None) -> Decoded:
    paths = [path for of_class in files.values() for path in of_class]
    number_of = {name: number for number, name in enumerate(classes)}
    labels = torch.tensor([number_of[name] for name, of_class in files.items() for _ in of_class])
    return Decoded(labels, lambda number: read_file(paths[number], image_size))


def _class_files(folder: Path) -> dict[str, list[str]]:
    """Class -> its image files, both sorted by name."""
    files = {name: _image_files(folder / name) for name in _subfolders(folder)}
    if not files:
        raise InputError(f"'{folder}' holds no class folders. Expected: '{folder}/<class>/*.jpg'.")
    empty = [name for name, paths in files.items() if not paths]
    if empty:
        raise InputError(
            f"there is no image in class folder '{folder / empty[0]}'"
            + (f" and {len(empty) - 1} others ({', '.join(empty[1:6])})" if len(empty) > 1 else "")
            + f". Add images ({', '.join(SUFFIXES)}) or remove the folder."
        )
    return files


def _subfolders(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _image_files(folder: Path) -> list[str]:
    return sorted(
        str(Path(parent, name))
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )
