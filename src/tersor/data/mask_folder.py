"""Folders of images and of masks with the class index of each pixel."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersor.core.errors import InputError, counted
from tersor.data.decoding import SUFFIXES, ImageFormat, mask_of, open_image, read_file, size_of
from tersor.data.image_sets import THREADS, Decoded, LazyTargets, Splits
from tersor.data.set_folders import set_folders
from tersor.data.splitting import none_of, with_test_set

IGNORE = 255
"""Class index of pixels that neither the loss nor the metric counts."""

_NAMES = "classes.txt"


def has_masks(folder: Path) -> bool:
    """Whether `folder`, or its training set, holds images and masks."""
    return any((place / "images").is_dir() and (place / "masks").is_dir() for place in (folder, folder / "train"))


def from_mask_folder(folder: Path, form: ImageFormat) -> Splits:
    """Load `folder/{train,test}/images/NAME.jpg` and `masks/NAME.png`, or `folder/{images,masks}`, which is split.

    A mask is a palette or grayscale file of class indices; 255 marks pixels to ignore. Images and masks are resized to
    exactly `form.size`. `folder/classes.txt` may name the classes, one per line; otherwise all masks are read once to
    count them.

    Raises:
        InputError: a set is missing or empty, an image has no mask, the mask has another size, or a class index is too
            large.
    """
    form = replace(form, crop=False)
    sets = set_folders(folder) or {"all": folder}
    pairs = {which: _pairs(place) for which, place in sets.items()}
    named = _named(folder / _NAMES)
    classes = named or tuple(
        str(number) for number in range(_counted([each for found in pairs.values() for each in found]))
    )
    images = {which: _images(each, form, classes) for which, each in pairs.items()}
    if "all" in images:
        return with_test_set(images["all"], classes)
    return Splits(images["train"], images.get("val") or none_of(images["train"]), images["test"], classes)


def _pairs(folder: Path) -> list[tuple[str, str]]:
    """The image and the mask of each name."""
    for name in ("images", "masks"):
        if not (folder / name).is_dir():
            raise InputError(
                f"'{folder}' holds no '{name}'. Expected: '{folder}/images/NAME.jpg' and '{folder}/masks/NAME.png'."
            )
    files = [path for path in sorted((folder / "images").iterdir()) if _is_image(path)]
    masks = {path.stem: path for path in (folder / "masks").iterdir() if _is_image(path)}
    if not files:
        raise InputError(f"there is no image in '{folder / 'images'}'. Add images ({', '.join(SUFFIXES)}).")
    missing = [path for path in files if path.stem not in masks]
    if missing:
        raise InputError(
            f"'{missing[0]}'"
            + (f" and {counted(len(missing) - 1, 'other image')} have no mask" if len(missing) > 1 else " has no mask")
            + f". Add '{folder / 'masks' / missing[0].stem}.png', or remove the image."
        )
    alone = sorted(masks.keys() - {path.stem for path in files})
    if alone:
        raise InputError(
            f"'{masks[alone[0]]}'"
            + (f" and {counted(len(alone) - 1, 'other mask')} have no image" if len(alone) > 1 else " has no image")
            + ". Add the images, or remove the masks."
        )
    return [(str(path), str(masks[path.stem])) for path in files]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _named(path: Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    names = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    if len(names) < 2:
        raise InputError(
            f"'{path}' names {len(names) or 'no'} class{'' if names else 'es'}. Write at least two, one per line, "
            "class 0 first."
        )
    return names


def _counted(pairs: list[tuple[str, str]]) -> int:
    """The number of classes: as many as the masks use, which are numbered without large gaps.

    Raises:
        InputError: fewer than two class indices, or fewer than half of those up to the largest, occur.
    """

    def numbers(pair: tuple[str, str]) -> set[int]:
        return set(np.unique(mask_of(open_image(pair[1]), None, f"'{pair[1]}'")).tolist())

    with ThreadPoolExecutor(THREADS) as pool:
        used = set[int]().union(*pool.map(numbers, pairs)) - {IGNORE}
    classes = 1 + max(used, default=0)
    if classes < 2 or 2 * len(used) < classes:
        shown = ", ".join(map(str, sorted(used)[:5])) + (", ..." if len(used) > 5 else "")
        found = f"only the class {'index' if len(used) == 1 else 'indices'} {shown}" if used else "no class index"
        raise InputError(
            f"the masks of '{Path(pairs[0][1]).parent}' use {found}, so the number of classes is unclear ({IGNORE} "
            "marks pixels to ignore). Number the classes from 0 without large gaps, such as 1 for a foreground, or "
            f"name all classes in {_NAMES}."
        )
    return classes


def _images(pairs: list[tuple[str, str]], form: ImageFormat, classes: tuple[str, ...]) -> Decoded:
    def target(number: int) -> Tensor:
        image, mask = pairs[number]
        numbers = mask_of(open_image(mask), None, f"'{mask}'")
        if numbers.shape != (size := size_of(image)):
            raise InputError(
                f"the mask '{mask}' has {numbers.shape[1]}x{numbers.shape[0]} pixels, and its image "
                f"{size[1]}x{size[0]}. Make their sizes equal."
            )
        return torch.from_numpy(mask_of(_checked(numbers, classes, mask), form.size, f"'{mask}'").copy())

    return Decoded(LazyTargets(len(pairs), target, THREADS), lambda number: read_file(pairs[number][0], form))


def _checked(numbers: NDArray[np.uint8], classes: tuple[str, ...], mask: str) -> NDArray[np.uint8]:
    strange = numbers[(numbers >= len(classes)) & (numbers != IGNORE)]
    if strange.size:
        raise InputError(
            f"the mask '{mask}' has the class index {int(strange.max())}, and there are {len(classes)} classes. "
            f"Possible: 0 to {len(classes) - 1}, and {IGNORE} for pixels to ignore."
        )
    return numbers
