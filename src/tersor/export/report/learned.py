"""What was learned on the way and is not in the artifact: how well features come back from their factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tersor.export.report.charts import columns, heat_map
from tersor.export.report.markup import Markup, join, tag
from tersor.export.report.measured import Numbers


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
