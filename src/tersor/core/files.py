"""Atomic writes, SHA-256 of files, and JSON from untrusted files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tersor.core.errors import InputError

LARGEST = 64 * 2**20
"""Largest JSON file, in bytes. `evidence.json` of a network with a thousand classes takes a fifth of it."""
_DIGITS = 18  # what 64 bits hold


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Yield a temporary file beside `path`, which replaces `path` on success and is removed on any error."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        InputError: the file cannot be written; an earlier one is unchanged.
    """
    try:
        with replacing(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}.") from error


def flush_to_disk(path: Path) -> None:
    """Flush a file or a folder, so that a power cut after a rename cannot lose its contents."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_json(path: Path, advice: str) -> Any:
    """Read a JSON file that may be damaged or malicious.

    Args:
        path: the file.
        advice: what to do if the file is damaged; the last sentence of the message.

    Raises:
        InputError: the file cannot be read, is larger than 64 MiB, is not JSON, is nested too deeply, or holds an
            integer of more than 18 digits.
    """
    try:
        with path.open("rb") as opened:
            content = opened.read(LARGEST + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    if len(content) > LARGEST:
        raise InputError(f"{path} is larger than {LARGEST >> 20} MiB, so it is not read. {advice}")
    try:
        return json.loads(content, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{path} is damaged: {reason}. {advice}") from error


def _integer(digits: str) -> int:
    count = len(digits.removeprefix("-"))
    if count > _DIGITS:
        raise ValueError(f"it contains an integer of {count} digits (at most {_DIGITS} are possible)")
    return int(digits)
