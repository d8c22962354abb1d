"""A weights file -> the sets of tensors in it, by key, and its metadata. Nothing in a file is ever executed."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tersor.core.errors import InputError, nearest
from tersor.models.weights_candidates import state_dicts

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
# what torch's reader raises on a damaged file depends on the byte that it meets: found by changing bytes at random
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
    """Every set of tensors by key in a file, by the place where it lies; and metadata.

    Raises:
        InputError: the file is missing, corrupt, no weights file, or would have to run code.
    """
    start = _first_bytes(path)
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
        found = {"": tensors} if tensors else {}
    else:
        found, metadata = _of_checkpoint(path, _read_checkpoint(path, start)), {}
    if not found:
        raise InputError(f"'{path}' holds no tensors. Write a file with the weights of the network.")
    return found, metadata


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError as error:
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        meant = nearest(path.name, beside)
        hint = f" Did you mean '{path.with_name(meant)}'?" if meant else ""
        raise InputError(f"there is no weights file '{path}'.{hint}") from error
    except OSError as error:  # a folder, no permission
        raise InputError(f"the weights file '{path}' cannot be read: {error.strerror}.") from error
    if not start:
        raise InputError(f"the weights file '{path}' is empty.")
    return start


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, *_DAMAGE) as error:
        raise InputError(f"'{path}' is corrupt, cut off, or no safetensors file: {error}.") from error


def _read_checkpoint(path: Path, start: bytes) -> object:
    if not start.startswith((_ZIP, _PICKLE)):
        raise InputError(
            f"'{path}' is no weights file. Possible: a .safetensors file, or what torch.save wrote of a state_dict."
        )
    if start.startswith(_PICKLE) and start[1:2] != b"\x02":  # torch.save writes protocol 2
        raise _refused(path, "what pickle wrote")
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
        raise InputError(f"'{path}' is corrupt, cut off, or no weights file: {reason}.") from error


def _refused(path: Path, what: str) -> InputError:
    return InputError(
        f"'{path}' holds {what}, and reading that would run code out of the file, so it is refused. Save the weights "
        "alone where the network can be loaded: safetensors.torch.save_file(model.state_dict(), "
        "'weights.safetensors'), or torch.save(model.state_dict(), 'weights.pt')."
    )


def _of_checkpoint(path: Path, content: object) -> dict[str, dict[str, Tensor]]:
    if isinstance(content, Mapping):
        content = cast("Mapping[Any, Any]", content)
        found = dict(state_dicts(content))
        if found or not content:
            return found
        entries = ", ".join(f"{key!r}: {type(value).__name__}" for key, value in list(content.items())[:5])
        what = f"a dict with {entries}"
    else:
        what = f"a value of type {type(content).__name__}"
    raise InputError(
        f"'{path}' holds no state_dict but {what}. Possible: a dict of tensors by key, bare or in a dict of others."
    )
