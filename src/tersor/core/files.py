"""JSON from a file that may come from a stranger: one message where it cannot be read, whatever is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tersor.core.errors import InputError

LARGEST = 64 * 2**20
"""Bytes; the evidence of a network with a thousand classes takes a fifth of it."""
_DIGITS = 18  # what 64 bits hold


def read_json(path: Path, advice: str) -> Any:
    """The values in a JSON file.

    Args:
        path: the file.
        advice: what to do where it is damaged; the last sentence of the message.

    Raises:
        InputError: it cannot be read, is larger than 64 MiB, is no JSON, is nested too deeply, or holds an integer of
            more than 64 bits.
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
    if len(digits) > _DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)
