"""ONNX files whose weights lie in other files, which a stranger's file may look for anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tersor.core.errors import InputError


def refuse_outside(path: Path) -> None:
    """Refuses a model that reads files outside of its own folder: by an absolute path, by `..`, by a link.

    What is no ONNX file at all is left to the runtime, which refuses it.

    Raises:
        InputError: it does.
    """
    if path.suffix != ".onnx":
        return
    import onnx  # here, because it takes longer to import than all the rest
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
                    f"{path} reads {entry.value[:100]!r}, a file outside of its folder, so it is refused. Put its "
                    "weights beside it, or into it: onnx.save(onnx.load(path), path)."
                )


def _inside(folder: Path, location: str) -> bool:
    try:
        return (folder / location).resolve().is_relative_to(folder)
    except (OSError, ValueError):  # a name that no file has
        return False


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor in a message, at any depth: of graphs, of their nodes, of functions."""
    for field, value in message.ListFields():
        if field.type != field.TYPE_MESSAGE:
            continue
        for each in (value,) if hasattr(value, "ListFields") else value:
            if each.DESCRIPTOR.name == "TensorProto":
                yield each
            else:
                yield from _tensors(each)
