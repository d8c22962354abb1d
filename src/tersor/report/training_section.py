"""What stages told of their way, and is not in the artifact: how well features come back from their factors, and where
weights went that were drawn to a grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tersor.report.charts import columns, heat_map, histogram
from tersor.report.summary import Numbers
from tersor.report.templates import Markup, join, number, tag


def reconstructions(numbers: Numbers) -> Markup:
    """A section for each stage that told of a reconstruction; nothing where none did."""
    told = [(stage["name"], stage["reconstruction"]) for stage in numbers["stages"] if "reconstruction" in stage]
    return join([_reconstruction(name, found) for name, found in told])


def _reconstruction(stage: str, told: Mapping[str, Any]) -> Markup:
    errors = [f"{100 * error:.1f} %" for error in told["errors"]]
    pairs = [
        tag("figure", heat_map(before, f"feature {place}"), heat_map(after, f"feature {place}, reconstructed"))
        for place, (before, after) in enumerate(zip(told["before"], told["after"], strict=True), 1)
    ]
    groups = [
        (f"epoch {epoch} of {len(errors)}: {error}", {"teacher": value})
        for epoch, (error, value) in enumerate(zip(errors, told["errors"], strict=True), 1)
    ]
    curve = "Error of the reconstruction in each epoch: " + ", ".join(errors)
    return tag(
        "section",
        tag("h2", "What comes back of a feature"),
        tag(
            "p",
            f"Before stage {stage}, an autoencoder learned to press what the teacher's {told['layer']} gives into a "
            f"factor, and to make the features of it again. Mean absolute error over the mean absolute feature, at "
            f"last: {errors[-1]}. Beside: the mean over the channels of a few features, above before, below after.",
        ),
        tag(
            "div",
            tag("figure", columns(groups, curve), tag("figcaption", curve)),
            tag("div", *pairs, class_="factors"),
            class_="pair",
        ),
    )


def drawn_weights(numbers: Numbers) -> Markup:
    """A section for each stage that drew weights to points; nothing where none did."""
    told = [(stage["name"], stage["drawn"]) for stage in numbers["stages"] if "drawn" in stage]
    return join([_drawn_weights(name, found) for name, found in told])


def _drawn_weights(stage: str, told: Mapping[str, Any]) -> Markup:
    grid = told["target"] == "grid"
    where = (
        "Across: where a weight lies between two points of its grid: in the middle on one of them, at the "
        "edges halfway to the next."
        if grid
        else "Across: a weight in steps of twice the largest of its layer, zero in the middle."
    )
    rule = (
        "Gradients were scaled by this distance: what is far moves much, what is on its point stays."
        if told["scale_by"] == "distance"
        else "This is the control: gradients were scaled by a constant, whatever the distance."
    )
    even = " Weights that lie evenly between points have a mean distance of 0.25 steps." if grid else ""
    few = [_positions(_layer_title(each, grid), each) for each in told["layers"]]
    return tag(
        "section",
        tag("h2", f"Weights drawn to {'their grid' if grid else 'zero'}"),
        tag(
            "p",
            f"Stage {stage}, psgd. ",
            tag("span", "Area", class_="key original"),
            ": weights as the stage found them. ",
            tag("span", "Bars", class_="key artifact"),
            f": as it left them, in full precision. {where}{even} Columns: how far weights have moved in the mean, "
            f"over the distance to their point at the beginning, both in steps. {rule}",
        ),
        tag("div", _positions("All layers", told["all"]), _moved(told["all"]["moved"]), class_="pair"),
        tag("div", *few, class_="grid"),
    )


def _layer_title(layer: Mapping[str, Any], grid: bool) -> str:
    return f"{layer['name']}, {layer['bits']} bits" if grid else layer["name"]


def _positions(name: str, told: Mapping[str, Any]) -> Markup:
    before, after = map(number, told["distance"])
    text = f"mean distance {before} steps before, {after} after"
    width = 1 / len(told["before"])
    bins = {"low": -0.5, "width": width, "shown_width": width, "before": told["before"], "shown": told["after"]}
    axis = tag("div", *[tag("span", end) for end in ("−0.5", "0", "0.5")], class_="axis")
    drawing = histogram(bins, f"positions of the weights of {name}: {text}", cut=False)
    return tag("figure", tag("h4", name), drawing, axis, tag("figcaption", text))


def _moved(means: Sequence[float | None]) -> Markup:
    width = 0.5 / len(means)
    groups = [
        (
            f"{place * width:.2f} to {(place + 1) * width:.2f} steps away: moved",
            {} if mean is None else {"artifact": mean},
        )
        for place, mean in enumerate(means)
    ]
    known = [mean for mean in means if mean is not None]
    text = f"moved by {number(known[0])} steps where nearest to a point, by {number(known[-1])} where farthest"
    axis = tag("div", *[tag("span", end) for end in ("0 steps from the point", "0.5")], class_="axis")
    return tag(
        "figure", tag("h4", "How far they moved"), columns(groups, text, height=64), axis, tag("figcaption", text)
    )
