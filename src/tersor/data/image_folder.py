"""Folders of image files, with one subfolder per class or without classes."""

# Not torchvision's ImageFolder, which takes hidden folders for classes and files such as "._1.png" for images.

from __future__ import annotations

import os
from pathlib import Path

import torch

from tersor.core.errors import InputError, counted
from tersor.data.decoding import SUFFIXES, ImageFormat, read_file
from tersor.data.image_sets import Decoded, Splits
from tersor.data.set_folders import set_folders, subfolders
from tersor.data.splitting import none_of, with_test_set


def from_folder(folder: Path, form: ImageFormat) -> Splits:
    """Load the images of `folder/{train,test}/<class>/`, at any depth below the class.

    `val` is the test set if there is no `test`, and the validation set otherwise. A folder that holds only `<class>/`
    subfolders is split: the test set is a fifth of every class, always the same. Classes are numbered in the order of
    their names. Hidden files and files without an image suffix are ignored.

    If none of the sets has subfolders, as in `folder/*.jpg` or `folder/{train,test}/*.jpg`, the images have no targets.

    Raises:
        InputError: the folder, `train` or `test` does not exist, a class has no image, the classes of the sets differ,
            or the first image cannot be decoded.
    """
    sets = set_folders(folder)
    places = {"all": folder} if sets is None else sets
    if all(_is_flat(place) for place in places.values()):
        return _without_classes({name: _unlabelled(place, form) for name, place in places.items()})
    if sets is None:
        files = _class_files(folder)
        return with_test_set(_images(tuple(files), files, form), tuple(files))
    train_files = _class_files(sets["train"])
    classes = tuple(train_files)
    test = _set_of(classes, sets["test"], form)
    missing = [name for number, name in enumerate(classes) if not (test.targets == number).any()]
    if missing:
        raise InputError(
            f"the test set of '{folder}' lacks {len(missing)} of the {len(classes)} classes: "
            f"{', '.join(missing[:5])}. Add test images of these classes, or remove the classes from train."
        )
    train = _images(classes, train_files, form)
    return Splits(train, _set_of(classes, sets["val"], form) if "val" in sets else none_of(train), test, classes)


def _is_flat(folder: Path) -> bool:
    """Whether there are images in the folder, and no subfolders."""
    return not subfolders(folder) and bool(_image_files(folder))


def _unlabelled(folder: Path, form: ImageFormat) -> Decoded:
    files = _image_files(folder)
    return Decoded(None, lambda number: read_file(files[number], form), count=len(files))


def _without_classes(sets: dict[str, Decoded]) -> Splits:
    if "all" in sets:
        return with_test_set(sets["all"], ())
    return Splits(sets["train"], sets.get("val") or none_of(sets["train"]), sets["test"], ())


def _set_of(classes: tuple[str, ...], folder: Path, form: ImageFormat) -> Decoded:
    files = _class_files(folder)
    extra = [name for name in files if name not in classes]
    if extra:
        raise InputError(
            f"'{folder}' holds classes that 'train' lacks: {', '.join(extra[:5])}. Possible: {', '.join(classes)}."
        )
    return _images(classes, files, form)


def _images(classes: tuple[str, ...], files: dict[str, list[str]], form: ImageFormat) -> Decoded:
    paths = [path for of_class in files.values() for path in of_class]
    number_of = {name: number for number, name in enumerate(classes)}
    labels = torch.tensor([number_of[name] for name, of_class in files.items() for _ in of_class])
    return Decoded(labels, lambda number: read_file(paths[number], form))


def _class_files(folder: Path) -> dict[str, list[str]]:
    """Class -> its image files, both sorted by name."""
    files = {name: _image_files(folder / name) for name in subfolders(folder)}
    if not files:
        raise InputError(f"'{folder}' holds no class folders. Expected: '{folder}/<class>/*.jpg'.")
    empty = [name for name, paths in files.items() if not paths]
    if empty:
        others = f" and {counted(len(empty) - 1, 'other')} ({', '.join(empty[1:6])})" if len(empty) > 1 else ""
        raise InputError(
            f"class folder '{folder / empty[0]}'{others} {'contain' if others else 'contains'} no images. Add images "
            f"({', '.join(SUFFIXES)}) or remove the folder{'s' if others else ''}."
        )
    return files


def _image_files(folder: Path) -> list[str]:
    """Image files at any depth, sorted. Links to folders are followed, but no folder is read twice."""
    files: list[str] = []
    seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        places = {os.path.realpath(Path(parent, each)): each for each in sorted(folders, reverse=True)}
        folders[:] = sorted(each for place, each in places.items() if place not in seen)
        seen.update(places)
        images = (name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith("."))
        files += [str(Path(parent, name)) for name in images]
    return sorted(files)
