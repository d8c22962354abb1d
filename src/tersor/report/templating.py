"""The Jinja2 environment of the report and the number formats of its templates.

Every value is escaped: names of layers, classes and stages are untrusted text.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tersor.report import charts
from tersor.report.verdict import RUNTIMES

_PNG = "data:image/png;base64,"


def number(value: float | None, digits: int = 3, unit: float = 1) -> str:
    """`value / unit` with `digits` significant digits and without an exponent; a dash for None.

    >>> number(0.25446), number(1234.5), number(None), number(0.0)
    ('0.254', '1,234', '–', '0')
    """
    if value is None:
        return "–"
    value = value / unit
    if value == 0:
        return "0"
    places = 0
    while places < 9 and abs(value) * 10**places < 10 ** (digits - 1):
        places += 1
    return f"{value:,.{places}f}"


def signed(value: float, unit: str = "", digits: int = 2) -> str:
    """A difference with its sign; "±0" if it rounds to zero."""
    rounded = round(value, digits)
    return f"±0{unit}" if not rounded else f"{'+' if rounded > 0 else '−'}{abs(rounded):.{digits}f}{unit}"


def fixed(value: float | None, digits: int, unit: float = 1) -> str:
    """`value / unit` with `digits` decimal places; a dash for None."""
    return "–" if value is None else f"{value / unit:.{digits}f}"


def inline_png(source: str) -> str:
    """`source`, if it is a PNG data URI.

    Raises:
        ValueError: it is any other address. The page must not load anything.
    """
    if not source.startswith(_PNG):
        raise ValueError(f"{source[:40]!r} is not an inline PNG")
    return source


@cache
def environment() -> Environment:
    """Templates of `report/templates`, with autoescape; an undefined name is an error."""
    loader = PackageLoader("tersor.report")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters.update(_FILTERS)
    made.globals.update(_GLOBALS)
    return made


def _percent(fraction: float, digits: int) -> str:
    return fixed(100 * fraction, digits)


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name} {index}" for index in range(1, count + 1)]


_FILTERS: dict[str, Any] = {
    "number": number, "signed": signed, "fixed": fixed, "percent": _percent, "minus": _minus,
    "thousands": "{:,}".format, "product": math.prod, "inline_png": inline_png, "runtime": RUNTIMES.__getitem__,
}  # fmt: skip
_GLOBALS: dict[str, Any] = {"charts": charts, "zip": zip, "numbered": _numbered}
