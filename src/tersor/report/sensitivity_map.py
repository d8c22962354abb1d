"""The figure of `tersor sensitivity`: layers by widths, the error of the logits in colour, as one SVG file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from tersor.quantization.sensitivity import Cost
from tersor.report.templates import Markup, number, tag

_COLOURS = ((255, 247, 236), (252, 141, 89), (127, 0, 0))
"""Of the least error, the middle and the largest, by its logarithm."""
_CELL, _ROW = 76, 22
_CHARACTER = 7.3
_ABOVE, _BELOW, _MARGIN = 84, 62, 16
_WHITE_FROM = 0.715


def draw(costs: Sequence[Cost], weights: Mapping[str, int], title: str, subtitle: str) -> str:
    """A heat map: a row for each layer, a column for each width, in each cell the error in percent.

    Args:
        costs: of every layer on every width.
        weights: layer -> how many weights it has, in the order of the rows.
        title: what network it is.
        subtitle: what was looked at.
    """
    widths = sorted({cost.bits for cost in costs})
    left = _MARGIN + _CHARACTER * max(len("layer (weights)"), *(len(_label(*each)) for each in weights.items()))
    wide = max(left + len(widths) * _CELL, _CHARACTER * max(len(title), len(subtitle), 72)) + _MARGIN
    high = _ABOVE + len(weights) * _ROW + _BELOW
    scale = _Scale([cost.error for cost in costs])
    rows = {name: _ABOVE + place * _ROW for place, name in enumerate(weights)}
    columns = {bits: left + place * _CELL for place, bits in enumerate(widths)}
    drawn = [
        tag("rect", width="100%", height="100%", fill="#ffffff"),
        _text(title, _MARGIN, 26, font_size=15, font_weight="bold"),
        _text(subtitle, _MARGIN, 46, fill="#555555"),
        _text("layer (weights)", _MARGIN, _ABOVE - 8, fill="#555555"),
        *(_text(f"{bits} bits", x + _CELL / 2, _ABOVE - 8, text_anchor="middle") for bits, x in columns.items()),
        *(_text(_label(name, weights[name]), _MARGIN, y + 15) for name, y in rows.items()),
        *(_cell(cost, columns[cost.bits], rows[cost.layer], scale) for cost in costs),
        *_legend(scale, left, high - _BELOW + 20),
    ]
    told = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {wide:.0f} {high}", "width": f"{wide:.0f}"}
    font = {"font_family": "ui-monospace, Menlo, Consolas, monospace", "font_size": 12, "fill": "#111111"}
    return tag("svg", tag("title", title), *drawn, **told, height=high, role="img", **font)


class _Scale:
    """Errors -> colours, by their logarithm: they span several powers of ten."""

    def __init__(self, errors: Sequence[float]) -> None:
        positive = [error for error in errors if error > 0] or [1.0]
        self.least, self.largest = min(positive), max(positive)

    def place(self, error: float) -> float:
        """0 for the least, 1 for the largest."""
        if error <= self.least:
            return 0.0
        return math.log(error / self.least) / math.log(self.largest / self.least)

    def colour(self, place: float) -> str:
        """Of a place from 0 to 1."""
        first = min(int(2 * place), 1)
        part = 2 * place - first
        mixed = (round(a + part * (b - a)) for a, b in zip(_COLOURS[first], _COLOURS[first + 1], strict=True))
        return "#" + "".join(f"{each:02x}" for each in mixed)


def _cell(cost: Cost, x: float, y: float, scale: _Scale) -> Markup:
    place = scale.place(cost.error)
    lost = "" if cost.drop is None else f", {cost.drop:.2f} points of accuracy lost"
    return tag(
        "g",
        tag("title", f"{cost.layer} on {cost.bits} bits: error {_percent(cost.error)} %{lost}"),
        tag("rect", x=f"{x:.1f}", y=y, width=_CELL, height=_ROW, fill=scale.colour(place), stroke="#ffffff"),
        _text(
            _percent(cost.error), x + _CELL / 2, y + 15, text_anchor="middle",
            fill="#ffffff" if place > _WHITE_FROM else "#000000",
        ),
    )  # fmt: skip


def _legend(scale: _Scale, x: float, y: float) -> Iterator[Markup]:
    """The colours, with the errors at their ends."""
    steps, each = 60, 4
    for step in range(steps):
        colour = scale.colour(step / (steps - 1))
        yield tag("rect", x=f"{x + step * each:.1f}", y=y, width=each + 0.5, height=10, fill=colour)
    yield _text(f"{_percent(scale.least)} %", x, y + 26)
    yield _text(f"{_percent(scale.largest)} %", x + steps * each, y + 26, text_anchor="end")
    yield _text("error, logarithmic", _MARGIN, y + 10, fill="#555555")


def _label(name: str, weights: int) -> str:
    return f"{name} ({weights:,})"


def _percent(error: float) -> str:
    return number(100 * error, 2)


def _text(content: str, x: float, y: float, **attributes: object) -> Markup:
    return tag("text", content, x=f"{x:.1f}", y=f"{y:.1f}", **attributes)
