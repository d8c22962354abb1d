"""The folder that a run leaves: written whole or not at all, and read only where nothing in it was damaged.

`manifest.json` tells the version of tersor and, of every other file, its bytes and SHA-256.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tersor.core.errors import InputError
from tersor.core.files import flush_to_disk, replacing, sha256
from tersor.core.resources import writable
from tersor.deploy.external_data import refuse_outside

MANIFEST = "manifest.json"
MODEL = "model.onnx"

_LARGEST_MANIFEST = 2**22
_LONGEST_NAME = 200
_BARE = (".onnx", ".xml")


_Size = Annotated[int, Field(ge=0, lt=2**63)]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True)
    bytes: _Size
    sha256: str


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True)
    tersor: str
    files: Annotated[dict[str, _Entry], Field(min_length=1)]


@dataclass(frozen=True)
class Artifact:
    """A folder whose files were verified, or a bare model file.

    Attributes:
        path: as it was given.
        model: the file to serve.
        files: the verified files by their names in the folder ("original.onnx", "numbers.json"); of a bare file
            itself alone.
    """

    path: Path
    model: Path
    files: Mapping[str, Path]


def require_free(out: Path | str) -> None:
    """Nothing lies at `out` yet, and a folder can be made there. Ask before the work begins.

    Raises:
        InputError: it exists, or its place cannot be written to.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise InputError(f"{out} exists already, and is not written over. Name another folder, or remove it.")
    ground = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    if not ground.is_dir():
        raise InputError(f"{out} cannot be made: {ground} is not a folder.")
    if not os.access(ground, os.W_OK | os.X_OK):
        raise InputError(f"{out} cannot be made: {ground} may not be written to.")


def write_folder(out: Path | str, fill: Callable[[Path], None], partial: Path | None = None) -> Path:
    """Makes the folder `out` with what `fill` writes and a manifest; if anything fails, nothing is left.

    Args:
        out: must not exist; folders above it are made.
        fill: is given an empty folder beside `out`, which becomes `out` by one rename when all is there.
        partial: where that folder is, on the same disk; what a process that was killed has left there is emptied.

    Raises:
        InputError: `out` is not free, before `fill` is called or after, or could not be written.
    """
    out = Path(out)
    require_free(out)
    above = [parent for parent in out.absolute().parents if not parent.exists()]
    partial = partial or out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with writable(out):
        try:
            partial.mkdir(parents=True)
            fill(partial)
            _write_manifest(partial)
            require_free(out)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in above:
                with suppress(OSError):  # on a disk that is read-only by now, nothing can be taken away
                    if parent.is_dir() and not any(parent.iterdir()):
                        parent.rmdir()
            raise
    return out


def replace_file(path: Path | str, name: str, write: Callable[[Path], object]) -> None:
    """Lets `write` write the file `name` of a folder anew, or for the first time, and tells the manifest of it.

    Args:
        path: a folder that `write_folder` wrote; all of it but `name` is verified first, so that what is drawn from
            the other files is drawn from what the run wrote.
        name: of the file in the folder.
        write: is given the folder.

    Raises:
        InputError: `path` is no such folder, or other files are missing or damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is not an artifact's folder. Give the folder that a run wrote.")
    manifest = _read_manifest(path)
    _refuse_damage(path, {other: entry for other, entry in manifest.files.items() if other != name})
    with writable(path):
        write(path)
        manifest.files[name] = _entry(path / name)
        with replacing(path / MANIFEST) as partial:
            _dump(manifest, partial)


def read_artifact(path: Path | str) -> Artifact:
    """Finds the model in a folder that `write_folder` wrote, every file of it verified, or takes a bare model file.

    Raises:
        InputError: `path` is neither, or files are missing or damaged; says which.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix not in _BARE:
            raise InputError(f"{path} is not a model: give an artifact's folder, or a file {' or '.join(_BARE)}.")
        refuse_outside(path)
        return Artifact(path, path, {path.name: path})
    if not path.is_dir():
        raise InputError(f"there is no file or folder {path}.")
    files = read_folder(path)
    if MODEL not in files:
        raise InputError(f"{path} holds no {MODEL}, only {', '.join(files)}.")
    for name, file in files.items():
        if name.endswith(".onnx"):
            refuse_outside(file)
    return Artifact(path, files[MODEL], files)


def read_folder(path: Path) -> dict[str, Path]:
    """The files of a folder that `write_folder` wrote, by their names in it, every one verified.

    Raises:
        InputError: it is no such folder, or files are missing or damaged; says which.
    """
    manifest = _read_manifest(path)
    _refuse_damage(path, manifest.files)
    return {name: path / name for name in manifest.files}


def _write_manifest(folder: Path) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    assert files, "`fill` wrote something"
    assert folder / MANIFEST not in files, "the manifest is written here"
    entries = {file.relative_to(folder).as_posix(): _entry(file) for file in files}
    _dump(_Manifest(tersor=importlib.metadata.version("tersor"), files=entries), folder / MANIFEST)


def _entry(file: Path) -> _Entry:
    flush_to_disk(file)
    return _Entry(bytes=file.stat().st_size, sha256=sha256(file))


def _dump(manifest: _Manifest, file: Path) -> None:
    file.write_text(json.dumps(manifest.model_dump(), indent=2) + "\n", encoding="utf-8")
    flush_to_disk(file)


def _read_manifest(folder: Path) -> _Manifest:
    file = folder / MANIFEST
    if not file.is_file():
        raise InputError(f"{folder} is not an artifact: it holds no {MANIFEST}. Give the folder that a run wrote.")
    try:
        with file.open("rb") as opened:
            manifest = _Manifest.model_validate_json(opened.read(_LARGEST_MANIFEST))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        raise InputError(f"{file} is damaged: {error.errors()[0]['msg']}.") from error
    for name in manifest.files:
        if not _lies_in(folder, name):
            raise InputError(f"{file} is damaged: it names {name[:60]!r}, which lies outside of the folder.")
    return manifest


def _lies_in(folder: Path, name: str) -> bool:
    named = PurePosixPath(name)
    if not name.isprintable() or len(name) > _LONGEST_NAME or "\\" in name or not named.parts:
        return False
    # resolved, since a link in the folder may lead out of it
    outside = named.is_absolute() or ".." in named.parts
    return not outside and (folder / name).resolve().is_relative_to(folder.resolve())


def _refuse_damage(folder: Path, entries: Mapping[str, _Entry]) -> None:
    wrong = {name: _damage(folder / name, entry) for name, entry in entries.items()}
    found = ", ".join(f"{name} {damage}" for name, damage in wrong.items() if damage)
    if found:
        raise InputError(f"{folder} is damaged: {found}. Copy it anew, or run its recipe.yaml again.")


def _damage(file: Path, entry: _Entry) -> str:
    """What is wrong with the file, or nothing."""
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    if size != entry.bytes:
        return f"has {size} bytes instead of {entry.bytes}"
    return "" if sha256(file) == entry.sha256 else "was changed"
