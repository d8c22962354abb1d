"""The figure of `tersor sensitivity`: layers by bit widths, with the error of the logits as colour, as one SVG file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tersor.quantization.sensitivity import Cost
from tersor.report.templating import environment, number

_COLOURS = ((255, 247, 236), (252, 141, 89), (127, 0, 0))
"""Of the smallest, the middle and the largest error, on a logarithmic scale."""
_CELL_WIDTH, _CELL_HEIGHT = 76, 22
_CHARACTER = 7.3
_TOP, _BOTTOM, _MARGIN = 84, 62, 16
_CORNER = "layer (weights)"
_WHITE_TEXT_FROM = 0.715
_LEGEND_STEPS = 60


def sensitivity_svg(costs: Sequence[Cost], weights: Mapping[str, int], title: str, subtitle: str) -> str:
    """A heat map with a row for each layer, a column for each bit width, and in each cell the error in percent.

    Args:
        costs: of every layer at every bit width.
        weights: layer -> number of weights, in the order of the rows.
        title: the network.
        subtitle: the images.
    """
    widths = sorted({cost.bits for cost in costs})
    labels = {name: f"{name} ({count:,})" for name, count in weights.items()}
    left = _MARGIN + _CHARACTER * max(len(_CORNER), *map(len, labels.values()))
    scale = _Scale([cost.error for cost in costs])
    columns = {bits: left + index * _CELL_WIDTH for index, bits in enumerate(widths)}
    rows = {name: _TOP + index * _CELL_HEIGHT for index, name in enumerate(weights)}
    return environment().get_template("sensitivity_map.svg").render(
        title=title,
        subtitle=subtitle,
        corner=_CORNER,
        width=max(left + len(widths) * _CELL_WIDTH, _CHARACTER * max(len(title), len(subtitle), 72)) + _MARGIN,
        height=_TOP + len(weights) * _CELL_HEIGHT + _BOTTOM,
        left=left, top=_TOP, bottom=_BOTTOM, margin=_MARGIN, cell_width=_CELL_WIDTH, cell_height=_CELL_HEIGHT,
        columns=columns,
        rows=[(labels[name], y) for name, y in rows.items()],
        cells=[_cell(cost, columns[cost.bits], rows[cost.layer], scale) for cost in costs],
        legend=[scale.colour(step / (_LEGEND_STEPS - 1)) for step in range(_LEGEND_STEPS)],
        least=_percent(scale.least),
        largest=_percent(scale.largest),
    )  # fmt: skip


class _Scale:
    """A logarithmic colour scale: errors span several powers of ten."""

    def __init__(self, errors: Sequence[float]) -> None:
        positive = [error for error in errors if error > 0] or [1.0]
        self.least, self.largest = min(positive), max(positive)

    def position(self, error: float) -> float:
        """0 for the smallest error, 1 for the largest."""
        if error <= self.least:
            return 0.0
        return math.log(error / self.least) / math.log(self.largest / self.least)

    def colour(self, position: float) -> str:
        """The colour of a position from 0 to 1."""
        first = min(int(2 * position), 1)
        part = 2 * position - first
        mixed = (round(a + part * (b - a)) for a, b in zip(_COLOURS[first], _COLOURS[first + 1], strict=True))
        return "#" + "".join(f"{each:02x}" for each in mixed)


class _Cell(NamedTuple):
    x: float
    y: float
    percent: str
    description: str
    colour: str
    ink: str


def _cell(cost: Cost, x: float, y: float, scale: _Scale) -> _Cell:
    position, percent = scale.position(cost.error), _percent(cost.error)
    loss = "" if cost.drop is None else f", accuracy drop {cost.drop:.2f} points"
    description = f"{cost.layer} at {cost.bits} bits: error {percent} %{loss}"
    ink = "#ffffff" if position > _WHITE_TEXT_FROM else "#000000"
    return _Cell(x, y, percent, description, scale.colour(position), ink)


def _percent(error: float) -> str:
    return number(100 * error, 2)
