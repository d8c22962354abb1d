"""A folder of image files, one subfolder a class."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tersor.core.errors import InputError
from tersor.data.decoding import SUFFIXES, read_file
from tersor.data.image_sets import Decoded, View
from tersor.data.splits import Splits
from tersor.data.stratified import generator, stratified

TEST_SHARE = 0.2
_TEST_SEED = 0


def from_folder(folder: Path, image_size: int | None) -> Splits:
    """The sets in `folder/{train,test}/<class>/`, in any depth below the class.

    `val` stands for `test` where there is no `test`, and is the validation set where there are both. A folder that
    holds only `<class>/` subfolders gets a test set of its own: a fifth of every class, always the same one. Classes
    are numbered by the order of their names. Hidden files and those that do not end like images are passed over.

    Raises:
        InputError: no folder, no `train` or `test`, an empty class, a class that `train` or the test images lack, the
            first image is broken.
    """
    if not folder.is_dir():
        what = "is a file. Unpack it" if folder.exists() else "does not exist. Correct the path"
        raise InputError(f"data folder '{folder}' {what}: what is wanted is folder/{{train,test}}/<class>/*.jpg.")
    names = {child.name for child in folder.iterdir() if child.is_dir()} & {"train", "val", "test"}
    # a lone "train" full of images may well be a class, beside "bus" and "car"
    if not names or (names == {"train"} and not _subfolders(folder / "train")):
        return _with_test_set(_class_files(folder), folder, image_size)
    if "train" not in names:
        raise InputError(f"'{folder}' holds {' and '.join(sorted(names))}, but no 'train'. Add train/<class>/*.jpg.")
    if names == {"train"}:
        raise InputError(
            f"'{folder}' holds 'train', but neither 'test' nor 'val'. Add test/<class>/*.jpg, or give '{folder}/train' "
            "as the folder: a test set is then cut from it."
        )
    train = _class_files(folder / "train")
    classes = tuple(train)
    test = _files_of(classes, folder / ("test" if "test" in names else "val"), image_size)
    lacking = [name for number, name in enumerate(classes) if not (test.labels == number).any()]
    if lacking:
        raise InputError(
            f"the test images of '{folder}' lack {len(lacking)} of the {len(classes)} classes: "
            f"{', '.join(lacking[:5])}. Add images of these, or take the classes out of train."
        )
    trained = _images(classes, train, image_size)
    if names == {"train", "val", "test"}:
        validation = _files_of(classes, folder / "val", image_size)
    else:
        validation = View(trained, torch.arange(0))
    return Splits(trained, validation, test, classes)


def _with_test_set(files: dict[str, list[str]], folder: Path, image_size: int | None) -> Splits:
    for name, paths in files.items():
        if len(paths) < 2:
            raise InputError(
                f"class folder '{folder / name}' holds a single image, so that no test image can be cut off. "
                "Add images, or divide them yourself into folder/{train,test}/<class>/."
            )
    everything = _images(tuple(files), files, image_size)
    count = max(len(files), round(TEST_SHARE * len(everything)))
    test, train = stratified(everything.labels, count, generator(_TEST_SEED), at_least=1, leave=1)
    return Splits(View(everything, train), View(everything, torch.arange(0)), View(everything, test), tuple(files))


def _files_of(classes: tuple[str, ...], folder: Path, image_size: int | None) -> Decoded:
    files = _class_files(folder)
    strange = [name for name in files if name not in classes]
    if strange:
        raise InputError(
            f"'{folder}' holds classes that 'train' lacks: {', '.join(strange[:5])}. Possible: {', '.join(classes)}."
        )
    return _images(classes, files, image_size)


def _images(classes: tuple[str, ...], files: dict[str, list[str]], image_size: int | None) -> Decoded:
    paths = [path for of_class in files.values() for path in of_class]
    number_of = {name: number for number, name in enumerate(classes)}
    labels = torch.tensor([number_of[name] for name, of_class in files.items() for _ in of_class])
    return Decoded(labels, lambda number: read_file(paths[number], image_size))


def _class_files(folder: Path) -> dict[str, list[str]]:
    """Class -> its image files, both in the order of their names."""
    files = {name: _image_files(folder / name) for name in _subfolders(folder)}
    if not files:
        raise InputError(f"'{folder}' holds no class folders. What is wanted is '{folder}/<class>/*.jpg'.")
    empty = [name for name, paths in files.items() if not paths]
    if empty:
        raise InputError(
            f"no image in class folder '{folder / empty[0]}'"
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
