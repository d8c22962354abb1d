"""HTML and SVG from plain values. What is not Markup is escaped: names of classes and layers are untrusted text."""

from __future__ import annotations

import html
from collections.abc import Iterable

_PNG = "data:image/png;base64,"


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: object) -> Markup:
    """An element. Attributes end in `_` where Python has the word, `_` inside becomes `-`; None leaves one out.

    >>> tag("td", "<i>", class_="name", aria_label="x")
    '<td class="name" aria-label="x">&lt;i&gt;</td>'
    """
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in {"img", "input", "br"}:
        return Markup(f"<{name}{told}>")
    return Markup(f"<{name}{told}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Markup:
    """Children one after the other."""
    return Markup("".join(child if isinstance(child, Markup) else html.escape(child) for child in children))


def picture(source: str, **attributes: object) -> Markup:
    """A PNG that lies in the page itself.

    Raises:
        ValueError: the source is anything else; a page loads nothing.
    """
    if not source.startswith(_PNG):
        raise ValueError(f"a picture from {source[:40]!r}")
    return tag("img", src=source, **attributes)


def table(head: Iterable[str], rows: Iterable[Iterable[str]], *, caption: str, class_: str | None = None) -> Markup:
    """A table in a box of its own that scrolls sideways; the first cell of a row is its head."""
    titles = tag("tr", *[cell if isinstance(cell, Markup) else tag("th", cell, scope="col") for cell in head])
    lines = [
        [cell if isinstance(cell, Markup) and cell.startswith("<t") else tag("td", cell) for cell in row]
        for row in rows
    ]
    body = [tag("tr", _head_of_row(line[0]), *line[1:]) for line in lines]
    inner = tag("table", tag("caption", caption), tag("thead", titles), tag("tbody", *body), class_=class_)
    return tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _head_of_row(cell: Markup) -> Markup:
    return Markup('<th scope="row"' + cell.removeprefix("<td").removesuffix("td>") + "th>")


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant ones, never in powers of ten; a dash for None.

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


def signed(value: float, unit: str, digits: int = 2) -> str:
    """A difference with its sign; "±0" where it rounds to nothing."""
    rounded = round(value, digits)
    return f"±0{unit}" if not rounded else f"{'+' if rounded > 0 else '−'}{abs(rounded):.{digits}f}{unit}"
