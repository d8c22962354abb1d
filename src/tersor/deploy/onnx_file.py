"""Read the graph of an ONNX file, which may be damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tersor.core.errors import InputError


def read_onnx(path: Path) -> Any:
    """The `ModelProto` of an ONNX file, without external data.

    Raises:
        InputError: the file is damaged, or not an ONNX file.
    """
    import onnx  # here, because it is slow to import
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise damaged(path) from error


def damaged(path: Path) -> InputError:
    """The error for a file that cannot be decoded."""
    return InputError(f"{path} is damaged or not an ONNX file. Copy or export it again.")
