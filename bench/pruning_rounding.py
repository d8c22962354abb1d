"""Compare roundings of the channel count: latency at equal MACs in both runtimes.

A network loses channels until a fraction of its MACs remains, with widths that are a multiple of 1, 4, 8 and 16. All
are timed in turns with the original. A coarse rounding meets the fraction less exactly, so the row names the actual
MACs. The result is latency over MACs, `latency_ratio / macs_ratio`: 1 means that time falls as much as the MACs.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import rows
import tables
from images import IMAGENET, TRAINED, Subject
from tersor.core.target import Runtime
from tersor.deploy.onnx import export
from tersor.evaluation.costs import costs
from tersor.evaluation.latency import measure_latency
from tersor.evaluation.session import open_session
from tersor.methods.channel_pruning import ChannelPruning
from tersor.training.context import AttachContext

RESULT = "pruning_rounding"
ROUNDINGS = (1, 4, 8, 16)
RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")
SUBJECTS = TRAINED | IMAGENET


def cut(subject: Subject, round_to: int, keep: float) -> nn.Module:
    """Return the network with at most `keep` of its MACs, by magnitude; a twentieth of each group stays."""
    method = ChannelPruning(keep_macs=keep, round_to=round_to, scope="global", floor=0.05)
    return method.attach(subject.network(), AttachContext(data=[subject.calibration(0)])).model.eval()


def measure(subject: Subject, runtime: Runtime, keep: float, batch: int, seconds: float) -> None:
    """Write a row for each rounding, all timed in one run."""
    what = {"model": subject.name, "runtime": runtime, "keep_macs": keep, "batch": batch, "versions": tables.versions()}
    identities = {rounding: {"round_to": rounding, **what} for rounding in ROUNDINGS}
    if all(rows.known(RESULT, identity) for identity in identities.values()):
        return
    example = subject.calibration(0)[:1]
    networks = {str(rounding): cut(subject, rounding, keep) for rounding in ROUNDINGS} | {"original": subject.network()}
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: export(each, example, Path(scratch) / f"{name}.onnx") for name, each in networks.items()}
        openers = {name: partial(open_session, file, runtime) for name, file in files.items()}
        precisions = {name: opener().precision for name, opener in openers.items()}
        timings = measure_latency(
            openers,
            example.numpy(),
            [batch],
            ratios=lambda timed, size: [timed.ratio(str(each), "original", size) for each in ROUNDINGS],
            seconds=seconds,
        )
    spent = {name: costs(copy.deepcopy(each), example).macs for name, each in networks.items()}
    for rounding, identity in identities.items():
        name = str(rounding)
        ratio = timings.ratio(name, "original", batch)
        macs = spent[name] / spent["original"]
        more = {"macs_ratio": macs, "latency_over_macs": ratio.value / macs, "precision": precisions[name]}
        more |= {"milliseconds": timings.spread(name, batch).median}
        tables.add_ratio(RESULT, identity, ratio, more, "latency_ratio")
        print(
            f"{subject.name} in {runtime}, multiples of {name}: {ratio.value:.3f} of the time, {macs:.3f} of the MACs"
        )


def show() -> None:
    """Print the rows of this machine."""
    here = rows.machine()
    heads = ("model", "runtime", "batch", "multiple of", "ms")
    heads += ("of the time (95 % interval)", "of the MACs", "time / MACs")
    table = Table(*heads)
    for row in [row for row in rows.read(RESULT) if row["machine"] == here]:
        low, high = row["spread"].values()
        told = (row["model"], row["runtime"], str(row["batch"]), str(row["round_to"]), f"{row['milliseconds']:.2f}")
        ratio = f"{row['latency_ratio']:.3f} ({low:.3f} to {high:.3f})"
        table.add_row(*told, ratio, f"{row['macs_ratio']:.3f}", f"{row['latency_over_macs']:.2f}")
    Console(width=150).print(table)


def main() -> None:
    """Measure what `bench/results/pruning_rounding.json` does not have yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet56"], choices=SUBJECTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument(
        "--keep", type=float, default=0.6, help="fraction of the MACs; with multiples of 16 a ResNet-56 cannot go lower"
    )
    parser.add_argument("--seconds", type=float, default=20, help="time limit per runtime and batch size")
    parser.add_argument("--table", action="store_true", help="only print existing rows")
    chosen = parser.parse_args()
    if not chosen.table:
        torch.set_num_threads(2)
        with rows.alone():
            for name in chosen.models:
                for runtime in RUNTIMES:
                    for batch in chosen.batches:
                        measure(SUBJECTS[name], runtime, chosen.keep, batch, chosen.seconds)
    show()


if __name__ == "__main__":
    main()
