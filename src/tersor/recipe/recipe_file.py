"""Read the text of a recipe file, with a size limit."""

from __future__ import annotations

from pathlib import Path

from tersor.core.errors import InputError, nearest

_LARGEST = 128 * 2**10
"""Bytes. A shipped recipe has about 1 KiB."""


def text_of(path: Path) -> str:
    """The text of a recipe file.

    Raises:
        InputError: the file does not exist, is too large, or is not UTF-8 text.
    """
    try:
        with path.open("rb") as opened:
            content = opened.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise InputError(f"{path} is larger than {_LARGEST >> 10} KiB, too large for a recipe.")
        return content.decode("utf-8-sig")
    except IsADirectoryError:
        raise InputError(f"{path} is a folder. A recipe is a YAML file.{_recipes_in(path)}") from None
    except FileNotFoundError:
        meant = nearest(path.name, [file.name for file in path.parent.glob("*.y*ml")])
        hint = f" Did you mean {path.parent / meant}?" if meant else ""
        raise InputError(f"file {path} not found.{hint}{_recipes_in(path.parent)}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text. A recipe is a YAML file.") from None
    except (OSError, ValueError) as error:  # ValueError: an invalid file name
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', error)}.") from None


def _recipes_in(folder: Path) -> str:
    files = sorted(file.name for file in folder.glob("*.y*ml"))
    return f" Possible in {folder}: {', '.join(files) or 'none'}."
