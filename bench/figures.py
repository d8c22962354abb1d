"""Draw the figures of docs/lecture.md from rows: one file for each third of the lecture that has rows.

    distillation.svg    accuracy over k and over T, with the variation between seeds: the line is one seed; the band of
                        the student alone, and the bars at k = 0.5 and T = 4, span all seeds
    quantization.svg    accuracy over bits: the steps of post-training quantization, and quantization-aware training
    pruning.svg         change of masks and fluctuation of accuracy for fixed masks, dpf and dcil; accuracy over
                        sparsity; accuracy over latency

With several seeds a line is their mean, and a band or bar spans them. Values within one span are not distinguishable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

import rows

FOLDER = rows.ROOT / "docs" / "figures"
FACTORS = {0.25: "factors, k = 0.25", 0.5: "factors, k = 0.5", 0.75: "factors, k = 0.75", 1.0: "factors, k = 1"}
SOFT = {1.0: "soft targets, T = 1", 2.0: "soft targets, T = 2", 4.0: "soft targets", 8.0: "soft targets, T = 8",
        16.0: "soft targets, T = 16"}  # fmt: skip
SWINGING = {"iterative": "fixed masks", "dpf": "dpf", "dcil": "dcil"}
"""Contenders of bench/pruning.py, and how each treats masked weights."""
BITS = (8, 4, 2)
BATCH = 32
"""Batch size of the latencies in the figure."""
RATE = 0.02
"""The learning rate of the recipe that bench/pruning_structured.py trains with."""
COLOURS = ("#0067a5", "#b44a00", "#00785a", "#8a5a93", "#c47f00", "#5d6268", "#a03060")
RUNGS = {
    "min-max": "min-max",
    "mse, of activations + equalisation, bias correction": "mse, equalization, bias correction",
    "ptq": "ptq, defaults",
    "adaround": "adaround",
    "brecq": "brecq",
    "qdrop": "QDrop",
    "brevitas, GPTQ": "Brevitas, GPTQ",
}
"""The steps that are drawn, and their labels."""

Found = dict[str, dict[int, rows.Row]]


def of_kind(result: str, kind: str) -> list[rows.Row]:
    """Return the rows of one kind."""
    return [row for row in rows.read(result) if row["kind"] == kind]


def found() -> Found:
    """Return the accuracy rows of distillation by contender and seed."""
    told: Found = {}
    for row in of_kind("distillation", "accuracy"):
        told.setdefault(row["contender"], {})[row["seeds"][0]] = row
    return told


def panel(axes: Any, told: Found, names: Mapping[float, str], label: str) -> None:
    """Draw accuracy over one parameter, and the student alone."""
    alone = [row["accuracy"] for row in told["alone"].values()]
    axes.axhspan(min(alone), max(alone), color="0.88", label=f"student alone, {len(alone)} seeds")
    known = {at: told[name] for at, name in names.items() if name in told}
    axes.plot(list(known), [seeds[0]["accuracy"] for seeds in known.values()], "o-", color=COLOURS[0], label="seed 0")
    for at, seeds in known.items():
        reached = [row["accuracy"] for row in seeds.values()]
        if len(reached) > 1:
            axes.plot([at, at], [min(reached), max(reached)], color=COLOURS[1], lw=3, label=f"{len(reached)} seeds")
    axes.set(xlabel=label, xticks=list(known), xticklabels=[f"{at:g}" for at in known], ylabel="accuracy, %")
    axes.legend(frameon=False, fontsize=8)


def errors(axes: Any, told: Found) -> None:
    """Draw the paraphraser's reconstruction error over k."""
    known = {at: told[name][0]["reconstruction_error"] for at, name in FACTORS.items() if name in told}
    told_in_percent = [100 * value for value in known.values()]
    axes.plot(list(known), told_in_percent, "o-", color=COLOURS[3])
    axes.set(xlabel="k, channels of the factor over those of the layer", ylabel="reconstruction error, %")
    axes.set_ylim(0, 1.1 * max(told_in_percent))


def distillation() -> Any:
    """Draw accuracy and reconstruction over k, and accuracy over T; return None if there are no rows."""
    told = found()
    if "alone" not in told:
        return None
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    panel(left, told, FACTORS, "k, channels of the factor over those of the layer")
    errors(middle, told)
    panel(right, told, SOFT, "T, temperature of the soft targets")
    right.set_xscale("log", base=2)
    right.set(xticks=list(SOFT), xticklabels=[f"{at:g}" for at in SOFT])
    return figure


def spanned(axes: Any, at: Sequence[float], values: Sequence[Sequence[float]], colour: str, label: str) -> None:
    """Draw a line through the means, and a bar over all values if there are several."""
    axes.plot(at, [mean(each) for each in values], "o-", color=colour, ms=4, label=label)
    for place, each in zip(at, values, strict=True):
        if len(each) > 1:
            axes.plot([place, place], [min(each), max(each)], color=colour, lw=3, alpha=0.4)


def ladder(axes: Any, told: Sequence[rows.Row]) -> None:
    """Draw the accuracy of post-training quantization over the bits of weights and activations."""
    widths = list(dict.fromkeys((row["bits"], row["activation_bits"]) for row in told))
    for (rung, name), colour in zip(RUNGS.items(), COLOURS, strict=True):
        mine: dict[tuple[int, int], list[float]] = {}
        for row in told:
            if row["rung"] == rung:
                mine.setdefault((row["bits"], row["activation_bits"]), []).append(row["accuracy"])
        spanned(axes, [widths.index(width) for width in mine], list(mine.values()), colour, name)
    names = [f"W{bits}A{activation_bits}" for bits, activation_bits in widths]
    axes.set(xticks=range(len(widths)), xticklabels=names, ylabel="accuracy, %", title="post-training quantization")
    axes.legend(frameon=False, fontsize=8)


def on_grids(axes: Any, told: Sequence[rows.Row]) -> None:
    """Draw the accuracy of quantization-aware training over the bits of weights and activations."""
    reached = {row["contender"]: row["accuracy"] for row in told}
    for name, colour in zip(("qat", "lsq"), COLOURS, strict=False):
        known = {bits: reached[f"{name}, W{bits}A{bits}"] for bits in BITS if f"{name}, W{bits}A{bits}" in reached}
        spanned(axes, [BITS.index(bits) for bits in known], [[value] for value in known.values()], colour, name)
    if "in float" in reached:
        axes.axhline(reached["in float"], color="0.6", ls="--", label="float, trained as long")
    names = [f"W{bits}A{bits}" for bits in BITS]
    axes.set(xticks=range(len(BITS)), xticklabels=names, ylabel="accuracy, %", title="quantization-aware training")
    axes.legend(frameon=False, fontsize=8)


def quantization() -> Any:
    """Draw accuracy over bits; return None if there are no rows."""
    kinds = {"ladder": ladder, "trained": on_grids}
    drawn = [(draw, of_kind("quantization", kind)) for kind, draw in kinds.items() if of_kind("quantization", kind)]
    if not drawn:
        return None
    figure, axes = plt.subplots(1, len(drawn), figsize=(4.6 * len(drawn), 3.8), layout="constrained", squeeze=False)
    for each, (draw, told) in zip(axes[0], drawn, strict=True):
        draw(each, told)
    return figure


def swinging(above: Any, below: Any, told: Sequence[rows.Row]) -> None:
    """Draw the fraction of masks that changes, for one seed (above), and validation accuracy for every seed (below)."""
    sparsity, _ = Counter(row["sparsity"] for row in told if row["contender"] in SWINGING).most_common(1)[0]
    for (contender, name), colour in zip(SWINGING.items(), COLOURS, strict=False):
        mine = [row for row in told if row["contender"] == contender and row["sparsity"] == sparsity]
        if not mine:
            continue
        epochs = range(1, len(mine[0]["curve"]) + 1)
        for row in mine:  # one line per seed: a mean would hide the fluctuation of a network
            below.plot(epochs, row["curve"], ".-", color=colour, lw=1, label=name if row is mine[0] else None)
        masks = mine[0]["masks"]
        if masks:
            at = [step * len(epochs) / mine[0]["steps"] for step in masks["steps"]]
            above.plot(at, [100 * value for value in masks["changed"]], color=colour, lw=1)
    above.set_yscale("symlog", linthresh=0.01)
    above.set(ylabel="changed masks, %", ylim=(0, None), title=f"{100 * sparsity:g} % of the weights masked")
    above.tick_params(labelbottom=False)
    below.set(xlabel="epoch", ylabel="validation accuracy, %")
    below.legend(frameon=False, fontsize=8)


def over_sparsity(axes: Any, told: Sequence[rows.Row]) -> None:
    """Draw accuracy over sparsity for contenders measured at several sparsities, and the dense network."""
    dense = [row["accuracy"] for row in told if not row["sparsity"]]
    if dense:
        axes.axhspan(min(dense), max(dense), color="0.88")
        axes.axhline(mean(dense), color="0.6", ls="--", label="dense, trained as long")
    places = sorted({row["sparsity"] for row in told if row["sparsity"]})
    for (contender, name), colour in zip(SWINGING.items(), COLOURS, strict=False):
        mine: dict[float, list[float]] = {}
        for row in sorted(told, key=lambda row: row["sparsity"]):
            if row["contender"] == contender:
                mine.setdefault(row["sparsity"], []).append(row["accuracy"])
        spanned(axes, [places.index(at) for at in mine], list(mine.values()), colour, name)
    names = [f"{100 * at:g}" for at in places]
    axes.set(xticks=range(len(places)), xticklabels=names, xlabel="masked weights, %", ylabel="test accuracy, %")
    axes.legend(frameon=False, fontsize=8)


def over_latency(axes: Any, told: Sequence[rows.Row]) -> None:
    """Draw accuracy over latency at one batch size, a mark for each row of the recipe's learning rate and runtime.

    The latencies come from the last machine that timed all contenders, and belong to removal by magnitude. Networks
    trained from scratch are left out: they are far below.
    """
    timed = of_kind("pruning_structured", "milliseconds")
    machine = [row["machine"] for row in timed if row["artifact"] == "resnet20, distilled"][-1]
    milliseconds = {
        (row["artifact"], row["times"], row["runtime"]): row["milliseconds"]
        for row in timed
        if row["batch"] == BATCH and row["machine"] == machine
    }
    runtimes = dict(zip(dict.fromkeys(runtime for _, _, runtime in milliseconds), "os^", strict=False))
    equal = [
        row for row in told if row.get("learning_rate") == RATE and "minutes" in row["budget"] and "removal" not in row
    ]
    for contender, colour in zip(dict.fromkeys(row["contender"] for row in equal), COLOURS, strict=False):
        axes.plot([], [], "-", color=colour, lw=4, label=contender)
        for row in equal:
            for runtime, mark in runtimes.items():
                at = milliseconds.get((contender, row["times"], runtime))
                if row["contender"] == contender and at is not None:
                    axes.plot(at, row["accuracy"], mark, color=colour, ms=6)
    for runtime, mark in runtimes.items():
        axes.plot([], [], mark, color="0.5", label=runtime)
    axes.set(xlabel=f"ms, batch {BATCH}", ylabel="test accuracy, %")
    axes.legend(frameon=False, fontsize=7)


def pruning() -> Any:
    """Draw fluctuating masks, accuracy over sparsity, accuracy over latency; return None if there are no rows."""
    masked, cut = of_kind("pruning", "accuracy"), of_kind("pruning_structured", "accuracy")
    drawn = [(over_sparsity, masked)] * bool(masked) + [(over_latency, cut)] * bool(cut)
    swings = any(row["contender"] in SWINGING for row in masked)
    if not drawn:
        return None
    count = swings + len(drawn)
    figure = plt.figure(figsize=(4.2 * count, 4.2), layout="constrained")
    grid = figure.add_gridspec(2, count, height_ratios=(1, 2))
    if swings:
        above = figure.add_subplot(grid[0, 0])
        swinging(above, figure.add_subplot(grid[1, 0], sharex=above), masked)
    for place, (draw, told) in enumerate(drawn, int(swings)):
        draw(figure.add_subplot(grid[:, place]), told)
    return figure


def main() -> None:
    """Write the figures."""
    mpl.rcParams.update({"svg.hashsalt": "tersor", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
                         "axes.spines.right": False})  # fmt: skip
    FOLDER.mkdir(exist_ok=True)
    for draw in (distillation, quantization, pruning):
        figure = draw()
        path = FOLDER / f"{draw.__name__}.svg"
        if figure is None:
            print(f"no rows for {path.name} yet")
            continue
        figure.savefig(path, metadata={"Date": None})
        print(f"written: {path.relative_to(rows.ROOT)}")


if __name__ == "__main__":
    main()
