"""Measure the baseline of this processor: a ResNet-20 in float32 and at the default precision of every runtime.

All files are timed in one interleaved run. The baseline, as `tersor run` names it, is the fastest at default precision.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

import rows
import tables
from images import SHARED
from tersor.deploy.onnx import export
from tersor.evaluation.latency import BATCH_SIZES, measure_latency
from tersor.evaluation.session import installed_runtimes, open_session
from tersor.evaluation.timings import Ratio, Timings
from tersor.models import build, load_weights

RESULT = "baseline"
WEIGHTS = SHARED / "models" / "resnet20-cifar10-jpeg.safetensors"
FLOAT32, DEFAULT = "float32", "default precision"


def network() -> nn.Module:
    """Return a ResNet-20, trained if its weights are available."""
    torch.manual_seed(0)
    model = build("resnet20", 10)
    if WEIGHTS.exists():
        load_weights(model, WEIGHTS)
    return model.eval()


def measure(seconds: float) -> None:
    """Write a row for each runtime, precision and batch size, and one for each baseline."""
    what = {"model": "resnet20", "versions": tables.versions()}
    identities = [{"kind": "baseline", "batch": size, **what} for size in BATCH_SIZES]
    if all(rows.known(RESULT, identity) for identity in identities):
        return
    runtimes = installed_runtimes()
    asked = {FLOAT32: "float32", DEFAULT: None}
    with tempfile.TemporaryDirectory() as folder:
        image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        file = export(network(), image, Path(folder) / "original.onnx")
        openers = {
            f"{runtime}, {name}": partial(open_session, file, runtime, precision=precision)
            for runtime in runtimes
            for name, precision in asked.items()
        }
        precisions = {name: opener().precision for name, opener in openers.items()}
        candidates = [f"{runtime}, {DEFAULT}" for runtime in runtimes]

        def wanted(timings: Timings, size: int) -> list[Ratio]:
            baseline = timings.fastest(candidates, size)
            return [timings.ratio(name, baseline, size) for name in openers if name != baseline]

        timings = measure_latency(openers, image.numpy(), ratios=wanted, seconds=seconds)
    for size, identity in zip(BATCH_SIZES, identities, strict=True):
        for name, precision in precisions.items():
            of_one = {"kind": "milliseconds", "artifact": name, "runtime": name.split(",")[0], "batch": size, **what}
            spread = asdict(timings.spread(name, size))
            tables.add(RESULT, of_one, "milliseconds", spread, {"precision": precision})
        baseline = timings.fastest(candidates, size)
        others = {name: timings.ratio(name, baseline, size) for name in openers if name != baseline}
        numbers = {
            "baseline": baseline,
            "precision": precisions[baseline],
            "slower": {name: [ratio.low, ratio.value, ratio.high] for name, ratio in others.items()},
            "ended_by": timings.ended_by[size],
        }
        spread = timings.spread(baseline, size)
        more = {"n": spread.n, "spread": {"p10": spread.p10, "p90": spread.p90}}
        rows.add(RESULT, identity, numbers | more, [0])


def show() -> None:
    """Print the rows of this machine."""
    here = rows.machine()
    found = [row for row in rows.read(RESULT) if row["machine"] == here]
    console = Console(width=150)
    milliseconds = [row for row in found if row["kind"] == "milliseconds"]
    if milliseconds:
        console.print(tables.by_batch("ResNet-20: milliseconds (p10 to p90)", milliseconds, "milliseconds", "artifact"))
    for row in [row for row in found if row["kind"] == "baseline"]:
        slower = "; ".join(
            f"{name} takes {value:.2f}x ({low:.2f} to {high:.2f})" for name, (low, value, high) in row["slower"].items()
        )
        named = f"{row['baseline']} ({row['precision']})"
        console.print(f"batch {row['batch']}: the baseline is {named}; {slower}. Ended by {row['ended_by']}.")


def main() -> None:
    """Measure what `bench/results/baseline.json` does not have yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="time limit per batch size")
    parser.add_argument("--table", action="store_true", help="only print existing rows")
    chosen = parser.parse_args()
    if not chosen.table:
        torch.set_num_threads(2)
        with rows.alone():
            measure(chosen.seconds)
    show()


if __name__ == "__main__":
    main()
