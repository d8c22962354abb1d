"""The budget of a search: accuracy, latency, size and time. Does not import torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tersor.core.errors import InputError

DEFAULT_DROP = 1.0
"""Largest drop in points, if neither a drop, a latency nor a size is given."""
DEFAULT_MINUTES = 30.0
_SIZES = {"kb": 1e-3, "mb": 1.0, "gb": 1e3}
_TIMES = {"s": 1 / 60, "m": 1.0, "h": 60.0}
_LATENCIES = {"us": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True)
class Budget:
    """Limits on the compressed network and on the search for it. Every part is optional.

    Attributes:
        max_drop: largest drop in the metric, in points; 1 by default if neither `latency_ms` nor `megabytes` is given,
            else unlimited.
        latency_ms: largest latency in milliseconds, by batch size.
        megabytes: largest size of the file, in 10^6 bytes.
        minutes: time of the search; 30 by default.

    Raises:
        InputError: a number is not finite, or is negative or 0 where that is not allowed.
    """

    max_drop: float | None = None
    latency_ms: Mapping[int, float] = field(default_factory=dict[int, float])
    megabytes: float | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.latency_ms, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"latency_ms is {self.latency_ms!r}. Write milliseconds by batch size: {{1: 2.0}}.")
        _check("max_drop", self.max_drop, "points, 0 or more, such as 0.5", zero=True)
        _check("megabytes", self.megabytes, "megabytes above 0, such as 0.5")
        _check("minutes", self.minutes, "minutes above 0, such as 45")
        for size, limit in self.latency_ms.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InputError(f"latency_ms has the batch size {size!r}. Write an integer of at least 1.")
            _check(f"latency_ms[{size}]", limit, "milliseconds above 0, such as 2.5")

    @property
    def points(self) -> float | None:
        """The largest drop in points: `max_drop`; 1 without any limit; None if only other limits are given."""
        given = self.max_drop is not None or self.latency_ms or self.megabytes is not None
        return self.max_drop if given else DEFAULT_DROP

    def as_numbers(self) -> dict[str, Any]:
        """The limits as plain values for JSON."""
        latency = {str(size): limit for size, limit in self.latency_ms.items()}
        return {"max_drop": self.points, "latency_ms": latency, "megabytes": self.megabytes}

    @staticmethod
    def of_numbers(numbers: Mapping[str, Any]) -> Budget:
        """The budget from the values that `as_numbers` returned."""
        latency = {int(size): limit for size, limit in numbers["latency_ms"].items()}
        return Budget(numbers["max_drop"], latency, numbers["megabytes"])

    def __str__(self) -> str:
        parts = [] if self.points is None else [f"at most {in_points(self.points)} lost"]
        parts += [f"{limit:g} ms at batch {size}" for size, limit in self.latency_ms.items()]
        parts += [] if self.megabytes is None else [f"{self.megabytes:g} MB"]
        return ", ".join(parts)


def in_points(number: float) -> str:
    """ "1 point", "0.5 points"."""
    return f"{number:g} point{'' if number == 1 else 's'}"


def _check(name: str, value: object, possible: str, *, zero: bool = False) -> None:
    if value is None:
        return
    valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or float(value) < 0 or (not zero and not value):  # pyright: ignore[reportArgumentType]
        raise InputError(f"{name} is {value!r}. Write {possible}.")


def parse_latency(texts: Sequence[str]) -> dict[int, float]:
    """Milliseconds by batch size from texts such as `1:2ms,128:8ms`; `2ms` alone means batch size 1.

    Raises:
        InputError: a text does not have this form, or a batch size has two limits.
    """
    limits: dict[int, float] = {}
    for text in texts:
        for part in text.split(","):
            size, colon, limit = part.rpartition(":")
            if colon and not size.strip().isdecimal():
                raise InputError(f"the latency is {text!r}. Write batch sizes and times: 1:2ms,128:8ms.")
            batch = int(size) if colon else 1
            if batch in limits:
                raise InputError(f"the latency has two limits for batch size {batch}. Write one.")
            limits[batch] = _quantity("latency", limit, _LATENCIES, "1:2ms,128:8ms")
    return limits


def parse_size(text: str) -> float:
    """Megabytes from `0.5MB` or `500kB`.

    Raises:
        InputError: the text does not have this form.
    """
    return _quantity("size", text, _SIZES, "0.5MB or 500kB")


def parse_time(text: str) -> float:
    """Minutes from `45m`, `90s` or `2h`.

    Raises:
        InputError: the text does not have this form.
    """
    return _quantity("time", text, _TIMES, "45m, 90s or 2h")


def _quantity(name: str, text: str, units: Mapping[str, float], form: str) -> float:
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)\s*", text)
    if found is None or found[2].lower() not in units or not float(found[1]):
        raise InputError(f"the {name} is {text.strip()!r}. Write a number above 0 with its unit: {form}.")
    return float(found[1]) * units[found[2].lower()]
