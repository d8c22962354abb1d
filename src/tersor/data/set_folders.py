"""The folders of the training, validation and test set in a data folder."""

from __future__ import annotations

from pathlib import Path

from tersor.core.errors import InputError


def set_folders(folder: Path) -> dict[str, Path] | None:
    """The folders "train", "test" and, if there is one, "val" of `folder`; None if it is not divided.

    `val` is the test set if there is no `test`.

    Raises:
        InputError: a set is missing.
    """
    names = {child.name for child in folder.iterdir() if child.is_dir()} & {"train", "val", "test"}
    # a "train" folder that holds images may be a class, beside "bus" and "car"
    if not names or (names == {"train"} and not subfolders(folder / "train")):
        return None
    if "train" not in names:
        raise InputError(f"'{folder}' holds {' and '.join(sorted(names))}, but no 'train'. Add it.")
    if names == {"train"}:
        raise InputError(
            f"'{folder}' holds 'train', but neither 'test' nor 'val'. Add 'test' with the same folders inside, or "
            f"give '{folder}/train' as the folder: its images are then split into training and test images."
        )
    sets = {name: folder / name for name in ("train", "val", "test") if name in names}
    return sets if "test" in names else {"train": sets["train"], "test": sets["val"]}


def subfolders(folder: Path) -> list[str]:
    """The names of the visible folders in `folder`, sorted."""
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
