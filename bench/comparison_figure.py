"""Draw docs/images/comparison.svg: accuracy against latency, tersor beside NNCF, ONNX Runtime and Torch-Pruning.

The points come from `bench/results/ptq.json` and `bench/results/equal_time.json`. The latencies of a panel come from
one interleaved run for each runtime. The two panels come from different runs, so compare points within a panel only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

import rows

PATH = rows.ROOT / "docs" / "images" / "comparison.svg"
UNIT = "amx_int8"
"""The instruction set of the processor whose rows are drawn."""
MODEL = "resnet56"
BATCH = 32
MARKERS = {"onnxruntime": "o", "openvino": "s"}
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
TERSOR, PEER, OTHER = "#0067a5", "#b44a00", "#6a6f75"


class Point(NamedTuple):
    """One artifact in one runtime: which rows hold it, how it is labelled, and where the label goes (in points)."""

    accuracy: str
    latency: str
    runtime: str
    label: str
    colour: str
    offset: tuple[int, int]


WITHOUT_TRAINING = [
    Point("fp32", "fp32", "onnxruntime", "original, float32", OTHER, (0, 10)),
    Point("fp32", "fp32", "openvino", "original, float32", OTHER, (0, -18)),
    Point("fp32, default precision", "fp32, default precision", "openvino", "original, bfloat16", OTHER, (22, -18)),
    Point("tersor for onnxruntime", "tersor for onnxruntime", "onnxruntime", "tersor", TERSOR, (12, -24)),
    Point("quantize_static", "quantize_static", "onnxruntime", "quantize_static", PEER, (0, 14)),
    Point("tersor for openvino", "tersor for openvino", "openvino", "tersor", TERSOR, (-12, -22)),
    Point("nncf", "nncf", "openvino", "NNCF", PEER, (0, 14)),
]
HALF_THE_MACS = [
    Point("fp32", "fp32", "onnxruntime", "original, float32", OTHER, (0, -16)),
    Point("fp32, default precision", "fp32, default precision", "openvino", "original, bfloat16", OTHER, (0, 9)),
    Point("tersor", "tersor", "onnxruntime", "tersor", TERSOR, (0, 9)),
    Point("torch-pruning", "torch-pruning", "onnxruntime", "Torch-Pruning +\nquantize_static", PEER, (8, -28)),
    Point("tersor", "tersor", "openvino", "tersor", TERSOR, (0, 9)),
    Point("torch-pruning", "torch-pruning", "openvino", "Torch-Pruning\n+ NNCF", PEER, (4, -28)),
    Point("resnet20, distilled", "resnet20, distilled", "onnxruntime", "distilled ResNet-20", OTHER, (0, -16)),
    Point("resnet20, distilled", "resnet20, distilled", "openvino", "distilled ResNet-20", OTHER, (8, -16)),
]


def only(found: list[rows.Row], **wanted: Any) -> rows.Row:
    """Return the single row that has these values on the chosen processor."""
    mine = [
        row
        for row in found
        if UNIT in row["machine"].get("units", []) and all(row.get(key) == value for key, value in wanted.items())
    ]
    assert len(mine) == 1, f"{len(mine)} rows for {wanted}"
    return mine[0]


def of_ptq(point: Point) -> tuple[rows.Row, list[float]]:
    """Return the latency row, and the accuracy of every draw of calibration images."""
    found, where = rows.read("ptq"), {"model": MODEL, "runtime": point.runtime}
    timed = only(found, kind="milliseconds", artifact=point.latency, batch=BATCH, **where)
    return timed, only(found, kind="accuracy", artifact=point.accuracy, **where)["accuracies"]


def of_equal_time(point: Point) -> tuple[rows.Row, list[float]]:
    """Return the latency row, and the accuracy of the only seed. ptq.json has the original's accuracy."""
    found, where = rows.read("equal_time"), {"model": MODEL, "runtime": point.runtime}
    timed = only(found, kind="milliseconds", artifact=point.latency, batch=BATCH, **where)
    if point.accuracy.startswith("fp32"):
        return timed, of_ptq(point)[1]
    return timed, [only(found, kind="accuracy", contender=point.accuracy, artifact="int8", **where)["accuracy"]]


def panel(axes: Any, title: str, points: list[Point], read: Callable[[Point], tuple[rows.Row, list[float]]]) -> None:
    """Draw the points of one benchmark; horizontal bars span the 10th to 90th percentile of the latency."""
    for point in points:
        timed, accuracies = read(point)
        middle, at = timed["milliseconds"], sum(accuracies) / len(accuracies)
        axes.plot([timed["spread"]["p10"], timed["spread"]["p90"]], [at, at], color=point.colour, lw=1, alpha=0.5)
        axes.plot([middle, middle], [min(accuracies), max(accuracies)], color=point.colour, lw=1, alpha=0.5)
        axes.plot(middle, at, MARKERS[point.runtime], color=point.colour, ms=7)
        axes.annotate(point.label, (middle, at), point.offset, textcoords="offset points", ha="center",
                      color=point.colour, fontsize=8.5)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(xlabel=f"milliseconds for a batch of {BATCH} (log scale)", ylabel="test accuracy, %")
    axes.tick_params(labelleft=True)
    axes.set_title(title, fontsize=10, loc="left")
    axes.margins(0.16, 0.22)
    axes.grid(alpha=0.2)


def main() -> None:
    """Write the figure."""
    mpl.rcParams.update({"svg.hashsalt": "tersor", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False,
                         "axes.spines.right": False})  # fmt: skip
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained", sharey=True)
    panel(left, "8 bits, no training", WITHOUT_TRAINING, of_ptq)
    panel(right, "half of the MACs, 8 bits, equal training time", HALF_THE_MACS, of_equal_time)
    handles = [plt.Line2D([], [], ls="", marker=MARKERS[key], color="0.3", label=RUNTIMES[key]) for key in MARKERS]
    left.legend(handles=handles, frameon=False, fontsize=8.5, loc="lower right")
    figure.patch.set_facecolor("white")
    PATH.parent.mkdir(exist_ok=True)
    figure.savefig(PATH, metadata={"Date": None})
    print(f"written: {PATH.relative_to(rows.ROOT)}")


if __name__ == "__main__":
    main()
