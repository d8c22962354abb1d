"""External data of ONNX files: an untrusted file must not read files outside of its folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tersor.core.errors import InputError


def refuse_outside(path: Path) -> None:
    """Refuse a model with external data outside of its folder: by an absolute path, `..` or a link.

    Files that are not ONNX are left to the runtime.

    Raises:
        InputError: the model reads such a file.
    """
    if path.suffix != ".onnx":
        return
    import onnx  # slow to import
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError):
        return
    folder = path.parent.resolve()
    for tensor in _tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location" and not _inside(folder, entry.value):
                raise InputError(
                    f"{path} refers to {entry.value[:100]!r}, a file outside of its folder, and is refused. "
                    "Export the network again with its weights inside the ONNX file, or beside it."
                )


def _inside(folder: Path, location: str) -> bool:
    try:
        return (folder / location).resolve().is_relative_to(folder)
    except (OSError, ValueError):  # not a file name
        return False


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor in a message, at any depth: in graphs, nodes, functions."""
    for field, value in message.ListFields():
        if field.type != field.TYPE_MESSAGE:
            continue
        for each in (value,) if hasattr(value, "ListFields") else value:
            if each.DESCRIPTOR.name == "TensorProto":
                yield each
            else:
                yield from _tensors(each)
