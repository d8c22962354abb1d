"""The user's line of code in a stack trace of torch.export."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

Frame = tuple[str, int, str]
"""File, line and code."""

_FRAME = re.compile(r'File "(.+?)", line (\d+), in (\S+)\n\s+(.+)')
_LIBRARY = re.compile(r"/(torch|torchvision)/")
_TERSOR = str(Path(__file__).parents[1])


def frames_in(stack_trace: str) -> list[Frame]:
    """The frames of a stack trace, the innermost last."""
    return [(file, int(line), code) for file, line, _, code in _FRAME.findall(stack_trace)]


def place_in(frames: Sequence[Frame]) -> str:
    """` (file.py, line 12: if x.sum() > 0:)`: the innermost frame of the user's code; empty if there is none."""
    frames = [frame for frame in frames if not frame[0].startswith(_TERSOR) and frame[0] != "<string>"]
    own = [frame for frame in frames if not _LIBRARY.search(frame[0]) and "/lib/python" not in frame[0]]
    inside = [frame for frame in frames if "/torchvision/" in frame[0] or "/site-packages/" in frame[0]]
    inside = [frame for frame in inside if "/site-packages/torch/" not in frame[0]]
    file, line, code = next(iter([*reversed(inside), *reversed(own)]), ("", 0, ""))
    return f" ({Path(file).name}, line {line}: {code.strip()})" if file else ""
