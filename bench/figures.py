"""Draws the figures of docs/lecture.md from rows: accuracy over k and over T, with what chance alone does.

The line is of one seed. The band around the student that learns alone, and the bars at k = 0.5 and T = 4, span all
seeds: what lies within such a span of something else is not told apart from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

import rows

FIGURE = rows.ROOT / "docs" / "figures" / "distillation.svg"
FACTORS = {0.25: "factors, k = 0.25", 0.5: "factors, k = 0.5", 0.75: "factors, k = 0.75", 1.0: "factors, k = 1"}
SOFT = {1.0: "soft targets, T = 1", 2.0: "soft targets, T = 2", 4.0: "soft targets", 8.0: "soft targets, T = 8",
        16.0: "soft targets, T = 16"}  # fmt: skip

Found = dict[str, dict[int, rows.Row]]


def found() -> Found:
    """Rows of accuracy by contender and seed."""
    told: Found = {}
    for row in rows.read("distillation"):
        if row["kind"] == "accuracy":
            told.setdefault(row["contender"], {})[row["seeds"][0]] = row
    return told


def panel(axes: Any, told: Found, names: Mapping[float, str], label: str) -> None:
    """Accuracy over one parameter, beside the student alone."""
    alone = [row["accuracy"] for row in told["alone"].values()]
    axes.axhspan(min(alone), max(alone), color="0.88", label=f"alone, {len(alone)} seeds")
    known = {at: told[name] for at, name in names.items() if name in told}
    axes.plot(list(known), [seeds[0]["accuracy"] for seeds in known.values()], "o-", color="#0067a5", label="seed 0")
    for at, seeds in known.items():
        reached = [row["accuracy"] for row in seeds.values()]
        if len(reached) > 1:
            axes.plot([at, at], [min(reached), max(reached)], color="#b44a00", lw=3, label=f"{len(reached)} seeds")
    axes.set(xlabel=label, xticks=list(known), xticklabels=[f"{at:g}" for at in known], ylabel="accuracy, %")
    axes.legend(frameon=False, fontsize=8)


def errors(axes: Any, told: Found) -> None:
    """What the paraphraser loses, over k."""
    known = {at: told[name][0]["reconstruction_error"] for at, name in FACTORS.items() if name in told}
    axes.plot(list(known), [100 * value for value in known.values()], "o-", color="#8a5a93")
    axes.set(
        xlabel="k, channels of the factor over those of the layer", ylabel="reconstruction error, %", ylim=(0, None)
    )


def main() -> None:
    """Writes the figure."""
    mpl.rcParams.update({"svg.hashsalt": "tersor", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
                         "axes.spines.right": False})  # fmt: skip
    told = found()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    panel(left, told, FACTORS, "k, channels of the factor over those of the layer")
    errors(middle, told)
    panel(right, told, SOFT, "T, temperature of the soft targets")
    right.set_xscale("log", base=2)
    right.set(xticks=list(SOFT), xticklabels=[f"{at:g}" for at in SOFT])
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, metadata={"Date": None})
    print(f"drawn: {FIGURE.relative_to(rows.ROOT)}")


if __name__ == "__main__":
    main()
