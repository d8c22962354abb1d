"""Read weights files: the dicts of tensors in them, and their metadata. Code in a file is never run."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tersor.core.errors import InputError, nearest

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_DEEPEST = 3
# what torch.load raises for damaged files; found by changing bytes at random
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
    OverflowError,
    OSError,
    struct.error,
)


def read_tensors(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Return every dict of tensors in a file, by its location; and the metadata.

    Raises:
        InputError: the file is missing, damaged, not a weights file, or would run code.
    """
    start = _first_bytes(path)
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
        state_dicts = {"": tensors} if tensors else {}
    else:
        state_dicts, metadata = _from_checkpoint(path, _read_checkpoint(path, start)), {}
    if not state_dicts:
        raise InputError(f"'{path}' holds no tensors. Give a file that holds the weights of the network.")
    return state_dicts, metadata


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError as error:
        others = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        similar = nearest(path.name, others)
        hint = f" Did you mean '{path.with_name(similar)}'?" if similar else ""
        raise InputError(f"there is no weights file '{path}'.{hint}") from error
    except OSError as error:  # a folder, or no permission
        raise InputError(f"the weights file '{path}' cannot be read: {error.strerror}.") from error
    if not start:
        raise InputError(f"the weights file '{path}' is empty. Copy or save it again.")
    return start


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, *_DAMAGE) as error:
        raise InputError(
            f"'{path}' is truncated, damaged, or not a safetensors file: {error}. Copy or save it again."
        ) from error


def _read_checkpoint(path: Path, start: bytes) -> object:
    if not start.startswith((_ZIP, _PICKLE)):
        raise InputError(
            f"'{path}' is not a weights file. Possible: a .safetensors file, or a state_dict saved by torch.save."
        )
    if start.startswith(_PICKLE) and start[1:2] != b"\x02":  # torch.save writes protocol 2
        raise _refused(path, "a pickle")
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and forbidden:
            raise _refused(path, f"a Python object ({forbidden[1]})") from error
        if "TorchScript" in str(error):
            raise _refused(path, "a TorchScript program") from error
        reason = str(error).partition("\n")[0][:160] or type(error).__name__
        raise InputError(
            f"'{path}' is truncated, damaged, or not a weights file: {reason}. Copy or save it again."
        ) from error


def _refused(path: Path, content: str) -> InputError:
    return InputError(
        f"'{path}' holds {content}, and is refused because reading it would run code from the file. If you trust the "
        "file, load the network yourself and save only its weights: safetensors.torch.save_file(model.state_dict(), "
        "'weights.safetensors'), or torch.save(model.state_dict(), 'weights.pt')."
    )


def _from_checkpoint(path: Path, content: object) -> dict[str, dict[str, Tensor]]:
    if isinstance(content, Mapping):
        content = cast("Mapping[Any, Any]", content)
        state_dicts = dict(_state_dicts(content))
        if state_dicts or not content:
            return state_dicts
        entries = ", ".join(f"{key!r}: {type(value).__name__}" for key, value in list(content.items())[:5])
        described = f"a dict with {entries}"
    else:
        described = f"a value of type {type(content).__name__}"
    raise InputError(f"'{path}' holds {described}. Possible: a state_dict (tensors by key), or a dict that holds one.")


def _state_dicts(
    content: Mapping[Any, Any], location: str = "", depth: int = 0
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dict with tensors in a checkpoint, and the keys that lead to it, in Python syntax."""
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield location, tensors
    for key, value in content.items():
        if isinstance(value, Mapping) and isinstance(key, str) and depth < _DEEPEST and not key.startswith("optim"):
            inner = cast("Mapping[Any, Any]", value)
            yield from _state_dicts(inner, f"{location}[{key!r}]", depth + 1)
