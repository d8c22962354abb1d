"""The file of a recipe -> its text, however large the file is, and whatever it is."""

from __future__ import annotations

from pathlib import Path

from tersor.core.errors import InputError, nearest

_LARGEST = 128 * 2**10
"""Bytes of a recipe; those that ship have a hundredth of it."""


def text_of(path: Path) -> str:
    """What is in the file of a recipe.

    Raises:
        InputError: there is none, or it is larger than a recipe or no text.
    """
    try:
        with path.open("rb") as opened:
            content = opened.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise InputError(f"{path} is larger than {_LARGEST >> 10} KiB, and a recipe is a page of YAML.")
        return content.decode("utf-8-sig")
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, and a recipe is a YAML file.{_recipes_in(path)}") from None
    except FileNotFoundError:
        meant = nearest(path.name, [file.name for file in path.parent.glob("*.y*ml")])
        hint = f" Did you mean {path.parent / meant}?" if meant else ""
        raise InputError(f"there is no file {path}.{hint}{_recipes_in(path.parent)}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text: a recipe is a YAML file, in UTF-8.") from None
    except (OSError, ValueError) as error:  # the latter: a name that no file has
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', error)}.") from None


def _recipes_in(folder: Path) -> str:
    files = sorted(file.name for file in folder.glob("*.y*ml"))
    return f" Possible in {folder}: {', '.join(files) or 'none'}."
