"""The folder of an artifact: written atomically, and verified when it is read.

`manifest.json` holds the version of tersor, and the size and SHA-256 of every other file.
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
_AGAIN = "Copy the folder again, or write it again."
_WRITTEN = "a folder that a run or tersor.save wrote"
_LONGEST_NAME = 200
_SHOWN = 10
"""Most folders that a message lists."""
_BARE = (".onnx", ".xml")
_WITH_MODEL = f"the folder of a run or a search, or a {' or '.join(_BARE)} file"
_FRONT = "front.json"
"""In the folder of a search, which has no manifest because its files change until the search ends."""


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
    """A verified folder, or a single model file.

    Attributes:
        path: the path of the folder or file.
        model: the file to deploy.
        files: the verified files by name ("original.onnx", "numbers.json"); for a single file, only itself.
    """

    path: Path
    model: Path
    files: Mapping[str, Path]


def checkpoints_of(out: Path) -> Path:
    """The folder of the checkpoints of an unfinished run that writes `out`."""
    return out.with_name(f"{out.name}.checkpoints")


def require_free(out: Path | str) -> None:
    """Check that the folder `out` does not exist and can be created.

    Raises:
        InputError: it exists or cannot be created.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise InputError(f"{out} already exists and will not be overwritten. Choose another folder, or remove it.")
    ground = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    if not ground.is_dir():
        raise InputError(f"cannot create {out}: {ground} is not a folder. Choose another folder.")
    if not os.access(ground, os.W_OK | os.X_OK):
        raise InputError(f"cannot create {out}: no write permission in {ground}. Choose another folder.")


def write_folder(out: Path | str, fill: Callable[[Path], None], partial: Path | None = None) -> Path:
    """Create the folder `out` with a manifest; if anything fails, nothing is left behind.

    Args:
        out: the folder; it must not exist. Parent folders are created.
        fill: writes the files into an empty temporary folder, which is then renamed to `out`.
        partial: the temporary folder, on the same disk; leftovers of a killed process are removed.

    Raises:
        InputError: `out` exists, before or after `fill`, or cannot be written.
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
                with suppress(OSError):  # the disk may have become read-only
                    if parent.is_dir() and not any(parent.iterdir()):
                        parent.rmdir()
            raise
    return out


def replace_file(path: Path | str, name: str, write: Callable[[Path], object]) -> None:
    """Replace or add the file `name` of a folder, and update the manifest.

    Args:
        path: a folder written by `write_folder`; all files but `name` are verified first.
        name: the name of the file.
        write: writes the file; it gets the folder.

    Raises:
        InputError: not such a folder, or other files are missing or damaged.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    _refuse_damage(path, {other: entry for other, entry in manifest.files.items() if other != name})
    with writable(path):
        write(path)
        manifest.files[name] = _entry(path / name)
        with replacing(path / MANIFEST) as partial:
            _dump(manifest, partial)


def read_artifact(path: Path | str) -> Artifact:
    """Verify a folder written by `write_folder` and find its model, or accept a single model file.

    The folder of a search and those of its points have no manifest: their files are accepted as single files are.

    Raises:
        InputError: `path` is neither a folder nor a model file, or files in it are missing or damaged, which the
            message names.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix not in _BARE:
            raise InputError(f"{path} is not a model. Pass {_WITH_MODEL}.")
        refuse_outside(path)
        return Artifact(path, path, {path.name: path})
    if not path.is_dir():
        raise InputError(f"file or folder {path} not found. Pass {_WITH_MODEL}.")
    files = _files_of_search(path) or read_folder(path, _WITH_MODEL)
    if MODEL not in files:
        raise InputError(f"{path} holds no {MODEL}, only {', '.join(files)}. Pass {_WITH_MODEL}.")
    for name, file in files.items():
        if name.endswith(".onnx"):
            refuse_outside(file)
    return Artifact(path, files[MODEL], files)


def front_of(path: Path) -> Path | None:
    """`front.json` of the search that an ONNX file, the folder of a point or the folder of the search belongs to."""
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    fronts = (each / _FRONT for each in (folder, *folder.parents[:2]))
    return next((each for each in fronts if each.is_file()), None)


def _files_of_search(path: Path) -> dict[str, Path]:
    """The files of the folder of a search, or of one of its points, under the names of a run; empty for others."""
    front = front_of(path)
    if front is None or (path / MANIFEST).is_file() or not (path / MODEL).is_file():
        return {}
    search = path if front.parent == path.absolute() else front.parent
    files = {
        MODEL: path / MODEL,
        "recipe.yaml": path / "recipe.yaml",
        "numbers.json": path / (_FRONT if search == path else "numbers.json"),
        "original.onnx": search / "baselines" / "original.onnx",
    }
    return {name: file for name, file in files.items() if file.is_file()}


def read_folder(path: Path, possible: str = _WRITTEN) -> dict[str, Path]:
    """The verified files of a folder written by `write_folder`, by name.

    Args:
        path: the folder.
        possible: what the user can pass, for the error message.

    Raises:
        InputError: not such a folder, or files are missing or damaged; the message names them.
    """
    manifest = _read_manifest(path, possible)
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


def _read_manifest(folder: Path, possible: str = _WRITTEN) -> _Manifest:
    file = folder / MANIFEST
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {problem}. Pass {_WRITTEN}.")
    if not file.is_file():
        if _files_of_search(folder):
            raise InputError(
                f"{folder} belongs to a search, but the folder of a run is needed. Create one by running `tersor "
                "run` on the recipe of a point in points/. The report of a search is in the folder of the search."
            )
        raise InputError(
            f"{folder} was not written by a run or tersor.save: it has no {MANIFEST}. {_found_in(folder, possible)}"
        )
    try:
        with file.open("rb") as opened:
            manifest = _Manifest.model_validate_json(opened.read(_LARGEST_MANIFEST))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        raise InputError(f"{file} is damaged: {error.errors()[0]['msg']}. {_AGAIN}") from error
    for name in manifest.files:
        if not _lies_in(folder, name):
            raise InputError(f"{file} is damaged: it lists {name[:60]!r}, a path outside the folder. {_AGAIN}")
    return manifest


def _found_in(folder: Path, possible: str) -> str:
    """The folders of runs and searches in a folder, and what to write; what is `possible` if there are none."""
    marks = ((MANIFEST, "runs"), (_FRONT, "searches"))
    found = {
        kind: sorted(str(file.parent) for depth in ("*", "*/*") for file in folder.glob(f"{depth}/{mark}"))
        for mark, kind in marks
    }
    first = next((each[0] for each in found.values() if each), None)
    if first is None:
        return f"Pass {possible}."
    more = {kind: ", ..." if len(each) > _SHOWN else "" for kind, each in found.items()}
    shown = [f"the {kind} {', '.join(each[:_SHOWN])}{more[kind]}" for kind, each in found.items() if each]
    return f"It contains {' and '.join(shown)}. Pass one of them, such as {first}."


def _lies_in(folder: Path, name: str) -> bool:
    named = PurePosixPath(name)
    if not name.isprintable() or len(name) > _LONGEST_NAME or "\\" in name or not named.parts:
        return False
    # resolved, because a link in the folder may point outside
    outside = named.is_absolute() or ".." in named.parts
    return not outside and (folder / name).resolve().is_relative_to(folder.resolve())


def _refuse_damage(folder: Path, entries: Mapping[str, _Entry]) -> None:
    wrong = {name: _damage(folder / name, entry) for name, entry in entries.items()}
    found = ", ".join(f"{name} {damage}" for name, damage in wrong.items() if damage)
    if found:
        again = "run its recipe.yaml again" if "recipe.yaml" in entries else "write it again with tersor.save"
        raise InputError(f"{folder} is damaged: {found}. Copy it again, or {again}.")


def _damage(file: Path, entry: _Entry) -> str:
    """How the file is damaged; empty if it is not."""
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    if size != entry.bytes:
        return f"has {size} bytes instead of {entry.bytes}"
    return "" if sha256(file) == entry.sha256 else "was changed"
