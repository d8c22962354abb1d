"""Files of six kinds, and mutations of them: flipped bytes, lost parts, exchanged values.

A `Kind` has seeds (whole files), a way of mutating one, and `read`: what tersor does with a file that somebody sent. It
may raise InputError and nothing else.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Random = random.Random

MARKER = "tersor_was_executed"
"""The folder that a payload creates in the working directory if it is executed."""

_NUMBERS = (0, -1, 1, 2, 7, 255, 2**31, 2**63, 10**30, -(2**40), 0.5, 1e308, -1e-308, float("nan"), float("inf"))
_TEXTS = (
    *("", "a", "..", "../../etc/passwd", "/dev/zero", "conv1", "weight", "<script>alert(1)</script>", '" onload="x'),
    *("\u2028", "\x00", "\ud800", "a" * 3000, "args.0.0=99999999", "NaN", "[]"),
    f'quantizers.x") or getattr(__import__("os"), "mkdir")("{MARKER}") or ("',
)
_NESTED = 30


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        name: name of the kind.
        seeds: whole files; several parts of one where it is a folder.
        mutate: a seed that was changed.
        read: reads it in an empty folder; raises InputError, or nothing.
    """

    name: str
    seeds: Sequence[bytes]
    mutate: Callable[[bytes, Random], bytes]
    read: Callable[[bytes, Path], object]


def bytes_changed(content: bytes, draw: Random) -> bytes:
    """Some of: flipped bits, changed bytes, truncation, a part that is repeated, moved or overwritten."""
    found = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        if not found:
            break
        at = draw.randrange(len(found))
        # headers lie at the beginning and at the end
        at = draw.choice((at, at % 64, len(found) - 1 - at % min(64, len(found))))
        at = min(at, len(found) - 1)
        length = draw.choice((1, 2, 4, 8, 64))
        match draw.randrange(7):
            case 0:
                found[at] ^= 1 << draw.randrange(8)
            case 1:
                found[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
            case 2:
                del found[at:]
            case 3:
                del found[at : at + length]
            case 4:
                found[at:at] = found[at : at + length] * draw.choice((1, 3))
            case 5:
                found[at : at + length] = draw.choice((b"\x00", b"\xff")) * length
            case _:
                other = draw.randrange(len(found))
                found[at : at + length] = found[other : other + length]
    return bytes(found)


def text_changed(content: bytes, draw: Random, words: Sequence[str]) -> bytes:
    """Like `bytes_changed`, or with keywords inserted, or lines exchanged, repeated or lost."""
    if draw.random() < 0.3:
        return bytes_changed(content, draw)
    lines = content.decode().splitlines()
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(lines))
        match draw.randrange(5):
            case 0:
                lines[at] = lines[draw.randrange(len(lines))]
            case 1:
                lines.insert(at, lines[draw.randrange(len(lines))])
            case 2:
                lines[at] = lines[at][: draw.randrange(len(lines[at]) + 1)]
            case _:
                parts = lines[at].split(" ")
                parts[draw.randrange(len(parts))] = draw.choice(words)
                lines[at] = " ".join(parts)
    return "\n".join(lines).encode(errors="surrogatepass")


def values_changed(value: Any, draw: Random) -> Any:
    """JSON with some values of another type or size, keys lost, added or exchanged, and longer lists."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        holder, key = _somewhere(value, draw)
        if holder is None:
            return _strange(draw)
        match draw.randrange(6):
            case 0 | 1:
                holder[key] = _strange(draw)
            case 2:
                del holder[key]
            case 3:
                other, place = _somewhere(value, draw)
                holder[key] = copy.deepcopy(other[place])
            case 4 if isinstance(holder, dict):
                holder[draw.choice(_TEXTS)] = holder.pop(key)
            case 4:
                holder.insert(key, copy.deepcopy(holder[key]))
            case _ if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
                holder[key] = draw.choice((-1, 0, 1000, 2**40, 0.1, -0.5)) * holder[key]
            case _:
                holder[key] = [holder[key]]
    return value


def _somewhere(value: Any, draw: Random) -> tuple[Any, Any]:
    """A mapping or list inside `value`, and a key in it; nested ones as often as outer ones."""
    places = [
        (holder, key)
        for holder in _holders(value)
        for key in (list(holder) if isinstance(holder, dict) else range(len(holder)))
    ]
    return draw.choice(places) if places else (None, None)


def _holders(value: Any) -> list[Any]:
    if not isinstance(value, dict | list):
        return []
    return [
        value,
        *(found for each in (value.values() if isinstance(value, dict) else value) for found in _holders(each)),
    ]


def _strange(draw: Random) -> Any:
    deep: Any = []
    for _ in range(_NESTED):
        deep = [deep]
    return copy.deepcopy(
        draw.choice((None, True, False, [], {}, [[]], {"a": {}}, deep, draw.choice(_NUMBERS), draw.choice(_TEXTS)))
    )


def json_changed(content: bytes, draw: Random) -> bytes:
    """Changed values, sometimes changed bytes, sometimes text that Python's JSON writer would not write."""
    if draw.random() < 0.1:
        return bytes_changed(content, draw)
    if draw.random() < 0.03:
        return draw.choice((b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"NaN", b"null", b"[]", b"{}", b""))
    return json.dumps(values_changed(json.loads(content), draw)).encode()


def digest(content: bytes) -> str:
    """SHA-256 as in a manifest: an attacker can write a manifest too."""
    return hashlib.sha256(content).hexdigest()
