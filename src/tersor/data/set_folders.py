"""The folders of the training, validation and test set in a data folder."""

from __future__ import annotations

from pathlib import Path

from tersor.core.errors import InputError

_SETS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Names of set folders, in lower case, and which set they hold."""


def set_folders(folder: Path) -> dict[str, Path] | None:
    """The folders of the "train", "test" and, if there is one, "val" set of `folder`; None if it is not divided.

    `val` is the test set if there is no `test`. The names `training`, `valid`, `validation` and `testing`, and upper
    case, are accepted.

    Raises:
        InputError: a set is missing, or two folders hold the same set.
    """
    found = _found(folder)
    # a "train" folder that holds images may be a class, beside "bus" and "car"
    if not found or (found.keys() == {"train"} and not subfolders(found["train"])):
        return None
    names = [path.name for path in found.values()]
    if "train" not in found:
        raise InputError(f"'{folder}' holds {' and '.join(sorted(names))}, but no 'train'. Add it.")
    if found.keys() == {"train"}:
        raise InputError(
            f"'{folder}' holds '{names[0]}', but neither 'test' nor 'val'. Add 'test' with the same folders inside, or "
            f"give '{folder}/{names[0]}' as the folder: its images are then split into training and test images."
        )
    sets = {name: found[name] for name in ("train", "val", "test") if name in found}
    return sets if "test" in sets else {"train": sets["train"], "test": sets["val"]}


def _found(folder: Path) -> dict[str, Path]:
    """Set -> its folder."""
    found: dict[str, Path] = {}
    for child in sorted(folder.iterdir()):
        name = _SETS.get(child.name.lower()) if child.is_dir() else None
        if name is None:
            continue
        if name in found:
            raise InputError(
                f"'{folder}' holds '{found[name].name}' and '{child.name}', which are names of the same set. Rename or "
                "remove one of them."
            )
        found[name] = child
    return found


def subfolders(folder: Path) -> list[str]:
    """The names of the visible folders in `folder`, sorted."""
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
