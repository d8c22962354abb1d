"""The figure of `tersor sensitivity`: layers by bit widths, with the error of the outputs as color, as one SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tersor.quantization.sensitivity import Cost
from tersor.report.templating import environment

_COLOURS = ((255, 247, 236), (252, 141, 89), (127, 0, 0))
"""Colors of the smallest, the middle and the largest error, on a logarithmic scale."""
_WHITE_TEXT_FROM = 0.715


def sensitivity_svg(costs: Sequence[Cost], weights: Mapping[str, int], title: str, subtitle: str) -> str:
    """A heat map with a row for each layer, a column for each bit width, and in each cell the error in percent.

    Args:
        costs: errors of every layer at every bit width.
        weights: layer -> number of weights, in the order of the rows.
        title: the network.
        subtitle: the images.
    """
    labels = {name: f"{name} ({count:,})" for name, count in weights.items()}
    return environment().get_template("sensitivity_map.svg").render(
        title=title, subtitle=subtitle, costs=costs, labels=labels, scale=_Scale([cost.error for cost in costs])
    )  # fmt: skip


class _Scale:
    """A logarithmic color scale: errors span several powers of ten."""

    def __init__(self, errors: Sequence[float]) -> None:
        positive = [error for error in errors if error > 0] or [1.0]
        self.least, self.largest = min(positive), max(positive)

    def position(self, error: float) -> float:
        """0 for the smallest error, 1 for the largest."""
        if error <= self.least:
            return 0.0
        return math.log(error / self.least) / math.log(self.largest / self.least)

    def colour(self, position: float) -> str:
        """The color of a position from 0 to 1."""
        first = min(int(2 * position), 1)
        part = 2 * position - first
        mixed = (round(a + part * (b - a)) for a, b in zip(_COLOURS[first], _COLOURS[first + 1], strict=True))
        return "#" + "".join(f"{each:02x}" for each in mixed)

    def text_colour(self, position: float) -> str:
        """The color of readable text on it."""
        return "#ffffff" if position > _WHITE_TEXT_FROM else "#000000"
