"""Fewer bits, rung by rung: what each way to quantize a trained ResNet-20 keeps of its accuracy.

    ladder     post-training quantization, from min-max to QDrop, at few bits: three draws of 512 calibration images
    trained    6 epochs on the grids: qat and lsq, beside ptq, at equal bits; and from scratch
    packed     a ResNet-56 with weights of 4 bits beside one of 8: bytes, and latency in both runtimes

Accuracy is on the test set, after the last step, computed in torch, where a quantizer rounds as the runtimes do. What
a row does not ask for is the method's default; defaults were chosen on validation images, never here.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

import rows
import tables
import training
from images import MEAN, STD, TRAINED, cifar
from tersor.core.method import Method
from tersor.core.target import Target
from tersor.data import Batches
from tersor.export.bench import latency, size_bytes
from tersor.export.onnx import export
from tersor.export.runtime import open_session
from tersor.measure import accuracy
from tersor.methods.adaround import AdaRound
from tersor.methods.brecq import BRECQ
from tersor.methods.ptq import PTQ

RESULT = "quantization"
SEEDS = (0, 1, 2)
WIDTHS = ((4, 8), (4, 4), (3, 8), (2, 8))
"""Bits of the weights and of the activations; the first and the last layer have 8."""
EPOCHS = 6
MSE: dict[str, Any] = {"weight_range": "mse", "activation_range": "mse"}

LADDER: dict[str, Callable[[int, int], Method]] = {
    "min-max": lambda bits, activation_bits: PTQ(bits=bits, activation_bits=activation_bits),
    "mse": lambda bits, activation_bits: PTQ(bits=bits, activation_bits=activation_bits, **MSE),
    "+ equalisation, bias correction": lambda bits, activation_bits: PTQ(
        bits=bits, activation_bits=activation_bits, equalize=True, bias_correction=True, **MSE
    ),
    "+ spread correction": lambda bits, activation_bits: PTQ(
        bits=bits, activation_bits=activation_bits, equalize=True, spread_correction=True, **MSE
    ),
    "adaround": lambda bits, activation_bits: AdaRound(bits=bits, activation_bits=activation_bits),
    "brecq": lambda bits, activation_bits: BRECQ(bits=bits, activation_bits=activation_bits),
    "qdrop": lambda bits, activation_bits: BRECQ(bits=bits, activation_bits=activation_bits, drop=0.5),
}

TRAINING: dict[str, dict[str, Any]] = {
    **{
        f"{name}, W{bits}A{bits}": {"methods": [{name: {"bits": bits, "activation_bits": bits}}]}
        for bits in (8, 4, 2)
        for name in ("qat", "lsq")
    },
    "lsq, W4A4, taught by itself": {
        "methods": [{"lsq": {"bits": 4, "activation_bits": 4}}, {"soft_targets": {"label_weight": 0.5}}]
    },
    "lsq, W4A4, from scratch": {"methods": [{"lsq": {"bits": 4, "activation_bits": 4}}], "scratch": True},
    "in float, from scratch": {"methods": [], "scratch": True},
    "in float": {"methods": []},
}


@cache
def _test() -> Batches:
    return Batches(cifar().test, 500, mean=MEAN, std=STD)


def ladder(rung: str, bits: int, activation_bits: int, seed: int) -> None:
    """Writes the row of one rung, width and draw of calibration images."""
    identity = {"kind": "ladder", "rung": rung, "bits": bits, "activation_bits": activation_bits, "seed": seed}
    if rows.known(RESULT, identity, anywhere=True):
        return
    images = Batches(cifar().train, 64, mean=MEAN, std=STD, shuffle=True, seed=seed)
    begun = time.perf_counter()
    attached = LADDER[rung](bits, activation_bits).attach(
        TRAINED["resnet20"].network(), data=images, target=Target(cpu="vnni")
    )
    for _ in attached.begin():
        pass
    seconds = time.perf_counter() - begun
    reached = accuracy(attached.model, _test())
    rows.add(
        RESULT, identity, {"accuracy": reached, "seconds": seconds, "n": 1, "spread": rows.spread([reached])}, [seed]
    )
    print(f"W{bits}A{activation_bits}, {rung}, draw {seed}: {reached:.2f} %, {seconds:.0f} s", flush=True)


def trained(name: str) -> None:
    """Writes the row of one training."""
    identity = {"kind": "trained", "contender": name, "epochs": EPOCHS}
    if rows.known(RESULT, identity, anywhere=True):
        return
    wanted = TRAINING[name]
    stage = {
        "epochs": EPOCHS,
        "optimizer": {"learning_rate": 0.1 if wanted.get("scratch") else 0.01},
        "methods": wanted["methods"],
    }
    teacher = "original" if any("soft_targets" in each for each in wanted["methods"]) else None
    given = training.recipe(stage, scratch=bool(wanted.get("scratch")), teacher=teacher)
    walk, told = training.walked(given, RESULT)
    reached = training.accuracy_on_test(walk)
    numbers = {"accuracy": reached, "minutes": told["minutes"], "precision": told["precision"], "n": 1}
    rows.add(RESULT, identity, {**numbers, "spread": rows.spread([reached])}, [0])
    print(f"{name}: {reached:.2f} %, {told['minutes']:.1f} minutes", flush=True)


def packed(batches: Sequence[int] = (1, 32, 128)) -> None:
    """Writes the rows of a ResNet-56 with weights of 4 bits beside one of 8."""
    subject = TRAINED["resnet56"]
    with tempfile.TemporaryDirectory() as made:
        for runtime in ("onnxruntime", "openvino"):
            what = {"kind": "packed", "runtime": runtime, "versions": tables.versions()}
            if all(rows.known(RESULT, {**what, "batch": batch}) for batch in batches):
                continue
            files = {bits: _exported(subject.network(), bits, runtime, Path(made)) for bits in (4, 8)}
            sessions = {str(bits): open_session(path, runtime) for bits, path in files.items()}
            sessions["8, again"] = open_session(files[8], runtime)
            timings = latency(sessions, subject.calibration(0)[:1].numpy(), batches)
            for batch in batches:
                ratio, noise = timings.paired_ratio("4", "8", batch), timings.paired_ratio("8, again", "8", batch)
                numbers = {
                    "bytes": [size_bytes(files[bits]) for bits in (4, 8)],
                    "ratio": ratio.median,
                    "noise": [noise.p10, noise.median, noise.p90],
                    "n": ratio.n,
                    "spread": {"p10": ratio.p10, "p90": ratio.p90},
                }
                rows.add(RESULT, {**what, "batch": batch}, numbers, [0])
                print(f"4 bits / 8 bits, {runtime}, batch {batch}: {ratio.median:.3f}", flush=True)


def _exported(model: nn.Module, bits: int, runtime: Any, made: Path) -> Path:
    images = TRAINED["resnet56"].calibration(0)
    attached = PTQ(bits=bits).attach(model, data=images.split(50), target=Target(runtime=runtime))
    for _ in attached.begin():
        pass
    return export(attached.model, images, made / f"{runtime}-{bits}.onnx")


def _of(kind: str) -> Iterator[rows.Row]:
    return (row for row in rows.read(RESULT) if row["kind"] == kind)


def show() -> None:
    """Prints the rows."""
    table = Table("rung", *(f"W{bits}A{activation_bits}" for bits, activation_bits in WIDTHS), title="ResNet-20, test")
    for rung in LADDER:
        cells: list[str] = []
        for width in WIDTHS:
            mine = [row for row in _of("ladder") if (row["bits"], row["activation_bits"]) == width]
            reached = [row["accuracy"] for row in mine if row["rung"] == rung]
            cells.append(
                f"{statistics.mean(reached):.2f} ({min(reached):.2f} to {max(reached):.2f})" if reached else ""
            )
        table.add_row(rung, *cells)
    Console(width=140).print(table)
    table = Table("training", "accuracy", "minutes", title=f"{EPOCHS} epochs")
    for row in _of("trained"):
        table.add_row(row["contender"], f"{row['accuracy']:.2f}", f"{row['minutes']:.1f}")
    Console(width=140).print(table)
    table = Table("runtime", "batch", "bytes, 4 and 8 bits", "4 bits / 8 bits", "p10 to p90", "8 / 8", title="packed")
    for row in _of("packed"):
        spread, noise = row["spread"], f"{row['noise'][0]:.2f} to {row['noise'][2]:.2f}"
        told = f"{row['ratio']:.3f}", f"{spread['p10']:.2f} to {spread['p90']:.2f}", noise
        table.add_row(row["runtime"], str(row["batch"]), " and ".join(map(str, row["bytes"])), *told)
    Console(width=140).print(table)


def main() -> None:
    """Measures what is not in `bench/results/quantization.json` yet, and prints all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["ladder", "trained", "packed"], help="all by default")
    parser.add_argument("--table", action="store_true", help="measure nothing, print what is there")
    chosen = parser.parse_args()
    parts = chosen.only or ["packed", "ladder", "trained"]
    if not chosen.table:
        with rows.alone():
            if "packed" in parts:
                packed()
            for seed in SEEDS if "ladder" in parts else ():
                for bits, activation_bits in WIDTHS:
                    for rung in LADDER:
                        ladder(rung, bits, activation_bits, seed)
            for name in TRAINING if "trained" in parts else ():
                trained(name)
    show()


if __name__ == "__main__":
    main()
