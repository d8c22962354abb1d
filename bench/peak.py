"""Measure the peak throughput of this machine, and the share of it that a ResNet-56 for CIFAR reaches.

The files are the network in float32, at the default precision and in 8 bits, in every installed runtime, and the winner
of a search if its folder is given. The peak is measured before and after the latencies: the two differ by the noise.

    python bench/peak.py
    python bench/peak.py --winner runs/compress
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table

import rows
import tables
from images import TRAINED
from tersor.api import quantize
from tersor.core.machine import default_threads
from tersor.core.target import Runtime
from tersor.deploy.onnx import export
from tersor.evaluation.costs import costs
from tersor.evaluation.latency import measure_latency
from tersor.evaluation.multiply_peak import INTEGERS, measure_peaks, share_of_peak
from tersor.evaluation.results import Peak
from tersor.evaluation.session import installed_runtimes, open_session
from tersor.search.folder import MODEL, read_front

RESULT = "peak"
SIZES = (1, 128)


@dataclass(frozen=True)
class Contender:
    """A file in a runtime, with the precision of its products and its MACs for one image."""

    file: Path
    runtime: str
    precision: str
    macs: int
    asked: str | None = None


def contenders(folder: Path, winner: Path | None) -> dict[str, Contender]:
    """Export the ResNet-56 for every runtime; return the files by name."""
    subject = TRAINED["resnet56"]
    network, images = subject.network(), subject.calibration(0)
    macs = costs(network, images[:1]).macs
    found: dict[str, Contender] = {}
    for runtime in installed_runtimes():
        original = export(network, images[:2], folder / f"{runtime}.onnx")
        integers = export(
            quantize(network, images, runtime=cast("Runtime", runtime)), images[:2], folder / f"{runtime}-int8.onnx"
        )
        default = open_session(original, runtime).precision
        found[f"{runtime}, float32"] = Contender(original, runtime, "float32", macs, "float32")
        if default != "float32":
            found[f"{runtime}, default precision"] = Contender(original, runtime, default, macs)
        found[f"{runtime}, int8"] = Contender(integers, runtime, INTEGERS, macs)
    if winner is not None:
        front = read_front(winner)
        best = front.point(front.best)
        found[f"{best.runtime}, winner"] = Contender(winner / MODEL, best.runtime, best.precision, best.macs)
    return found


def peaks_now() -> list[Peak]:
    """Measure the peaks of all installed runtimes."""
    return [peak for runtime in installed_runtimes() for peak in measure_peaks(runtime, default_threads())]


def measure(seconds: float, winner: Path | None) -> None:
    """Write a row for each peak, and one for each file and batch size."""
    what = {"model": "resnet56", "versions": tables.versions()}
    with tempfile.TemporaryDirectory() as folder:
        files = contenders(Path(folder), winner)
        before = peaks_now()
        openers = {name: partial(open_session, each.file, each.runtime, precision=each.asked)
                   for name, each in files.items()}  # fmt: skip
        image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).numpy()
        timings = measure_latency(openers, image, SIZES, seconds=seconds)
        peaks = [max(pair, key=lambda peak: peak.macs_per_second) for pair in zip(before, peaks_now(), strict=True)]
    for first, peak in zip(before, peaks, strict=True):
        identity = {"kind": "peak", "runtime": peak.runtime, "precision": peak.precision, **what}
        numbers: dict[str, Any] = {"macs_per_second": peak.macs_per_second, "n": peak.n}
        rows.add(RESULT, identity, numbers | {"spread": {"median": peak.median, "before": first.macs_per_second}}, [0])
    for name, each in files.items():
        for size in SIZES:
            spread = timings.spread(name, size)
            share = share_of_peak(
                each.runtime, each.precision, size * each.macs, spread.median, peaks, float(each.precision == INTEGERS)
            )
            identity = {"kind": "share", "artifact": name, "batch": size, **what}
            numbers = {"share": share, "milliseconds": spread.median, "macs": each.macs, "precision": each.precision}
            rows.add(RESULT, identity, numbers | {"n": spread.n, "spread": {"p10": spread.p10, "p90": spread.p90}}, [0])


def show() -> None:
    """Print the rows of this machine."""
    found = [row for row in rows.read(RESULT) if row["machine"] == rows.machine()]
    peaks = Table("runtime", "precision", "billion MACs/s", "median run", title="Peak throughput")
    shares = Table("file", "batch", "ms", "% of peak", title="ResNet-56")
    for row in found:
        if row["kind"] == "peak":
            rates = row["macs_per_second"], row["spread"]["median"]
            peaks.add_row(row["runtime"], row["precision"], *(f"{rate / 1e9:.1f}" for rate in rates))
        else:
            shares.add_row(
                row["artifact"], str(row["batch"]), f"{row['milliseconds']:.3g}", f"{100 * row['share']:.0f}"
            )
    console = Console(width=120)
    console.print(peaks, shares)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="time limit per batch size")
    parser.add_argument("--winner", type=Path, help="folder of a search for a ResNet-56")
    parser.add_argument("--table", action="store_true", help="only print existing rows")
    chosen = parser.parse_args()
    if not chosen.table:
        torch.set_num_threads(2)
        with rows.alone():
            measure(chosen.seconds, chosen.winner)
    show()


if __name__ == "__main__":
    main()
