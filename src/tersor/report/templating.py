"""The Jinja2 environment of the report and the number formats of its templates.

Every value is escaped: names of layers, classes and stages are untrusted text.
"""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from tersor.report import charts

_PNG = "data:image/png;base64,"


def number(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits and without an exponent; a dash for None.

    >>> number(0.25446), number(1234.5), number(None), number(0.0)
    ('0.254', '1,234', '–', '0')
    """
    if value is None:
        return "–"
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


def fixed(value: float | None, digits: int) -> str:
    """`value` with `digits` decimal places; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


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
    made.filters |= {
        "number": number,
        "signed": signed,
        "fixed": fixed,
        "inline_png": inline_png,
        "thousands": "{:,}".format,
        "minus": lambda value: str(value).replace("-", "−"),
        "share_of": charts.share_of,
    }
    made.globals |= {
        "zip": zip,
        "columns_of": charts.columns,
        "histogram_paths": charts.histogram_paths,
        "line_points": charts.line_points,
        "mask_paths": charts.mask_paths,
        "opacities": charts.opacities,
    }
    return made
