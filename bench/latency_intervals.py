"""Check whether the 95 % interval of a latency ratio covers the true ratio if it is known.

There are three experiments in each runtime, ten times each:

- An 8-bit ResNet-20 against itself. The true ratio is 1.
- A stack of convolutions against two inferences of the same stack in sequence. The true ratio is 2.
- The stack against a file that contains two such stacks, each with weights of its own. The true ratio is 2 up to the
  fixed cost of a call (`fixed` is the share of a network that only copies its input).

At least nine of ten intervals should cover the true ratio. The two stacks of the last file must not have equal weights:
OpenVINO merges equal constants. It then adds the biases in nodes of their own instead of inside the convolutions, and
takes 3 to 4 % longer.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import rows
import tables
from tersor.core.target import Target
from tersor.deploy.onnx import export
from tersor.evaluation.latency import measure_latency
from tersor.evaluation.session import Array, Session, installed_runtimes, open_session
from tersor.evaluation.timings import Ratio, Timings
from tersor.methods.ptq import PTQ
from tersor.models import build
from tersor.training.context import AttachContext

RESULT = "latency_intervals"
STACK = (8, 64, 32, 56)
"""Outer channels, inner channels, inner layers, pixels. Few outer channels keep the fixed cost of a call small."""
LARGER = 112
"""Pixels of the input of the file that contains two stacks, for which the fixed cost is a smaller share."""
TRUE = {"the same file twice": 1.0, "two inferences in sequence": 2.0, "a file of two such networks": 2.0}

Openers = Mapping[str, Callable[[], Session]]


def stack() -> nn.Module:
    """Return convolutions whose output has the shape of the input, (N, 8, H, W)."""
    ends, inside, layers, _ = STACK
    inner = [each for _ in range(layers) for each in (nn.Conv2d(inside, inside, 3, padding=1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(ends, inside, 3, padding=1), *inner, nn.Conv2d(inside, ends, 3, padding=1))


def same_file(runtime: Any, folder: Path) -> tuple[Openers, Array]:
    """Return an 8-bit ResNet-20 twice, and an image."""
    torch.manual_seed(0)
    images = torch.randn(64, 3, 32, 32)
    attached = PTQ().attach(build("resnet20", 10).eval(), AttachContext(data=[images], target=Target(runtime=runtime)))
    attached.begin()
    opener = partial(open_session, export(attached.model, images, folder / f"{runtime}.onnx"), runtime)
    return {"slow": opener, "fast": opener}, images[:1].numpy()


def two_inferences(runtime: str, folder: Path) -> tuple[Openers, Array]:
    """Return a stack whose every run is two inferences, the stack, and an input."""
    torch.manual_seed(0)
    image = torch.randn(1, STACK[0], STACK[-1], STACK[-1])
    opener = partial(open_session, export(stack().eval(), image, folder / "single.onnx"), runtime)

    def doubled() -> Session:
        session = opener()

        def infer(images: Array) -> Array:
            session.infer(images)
            return session.infer(images)

        return replace(session, infer=infer)

    return {"slow": doubled, "fast": opener}, image.numpy()


def twice(runtime: str, folder: Path) -> tuple[Openers, Array]:
    """Return two stacks in sequence, the first one alone, a network that copies its input, and an input."""
    torch.manual_seed(0)
    single, image = stack().eval(), torch.randn(1, STACK[0], LARGER, LARGER)
    networks = {"slow": nn.Sequential(single, stack()), "fast": single, "fixed": nn.ReLU()}
    files = {name: export(each.eval(), image, folder / f"{name}.onnx") for name, each in networks.items()}
    return {name: partial(open_session, file, runtime) for name, file in files.items()}, image.numpy()


def measure(experiment: str, runtime: str, repetitions: int, seconds: float) -> None:
    """Write the row of one experiment."""
    identity = {"kind": experiment, "runtime": runtime, "versions": tables.versions()}
    if rows.known(RESULT, identity | {"n": repetitions}):
        return
    prepare = dict(zip(TRUE, (same_file, two_inferences, twice), strict=True))[experiment]
    with tempfile.TemporaryDirectory() as folder:
        openers, image = prepare(runtime, Path(folder))
        timed = [_timed(openers, image, seconds) for _ in range(repetitions)]
        precision = openers["fast"]().precision
    ratios = [each.ratio("slow", "fast", 1) for each in timed]
    covered = [ratio.low <= TRUE[experiment] <= ratio.high for ratio in ratios]
    numbers: dict[str, Any] = {
        "true": TRUE[experiment],
        "covered": sum(covered),
        "intervals": [[ratio.low, ratio.value, ratio.high] for ratio in ratios],
        "rounds": [ratio.n for ratio in ratios],
        "ended_by": [each.ended_by[1] for each in timed],
        "milliseconds": timed[0].spread("fast", 1).median,
        "precision": precision,
        "n": repetitions,
        "spread": rows.spread([ratio.value for ratio in ratios]),
    }
    if "fixed" in openers:
        numbers["fixed"] = timed[0].spread("fixed", 1).median / numbers["milliseconds"]
    rows.add(RESULT, identity, numbers, [0])
    print(
        f"{experiment} in {runtime}: {sum(covered)} of {repetitions} intervals cover {TRUE[experiment]:g}", flush=True
    )


def _timed(openers: Openers, image: Array, seconds: float) -> Timings:
    def wanted(timings: Timings, size: int) -> list[Ratio]:
        return [timings.ratio("slow", "fast", size)]

    return measure_latency(openers, image, [1], ratios=wanted, seconds=seconds)


def show() -> None:
    """Print the rows of this machine."""
    here = rows.machine()
    table = Table("experiment", "runtime", "true", "covered", "ms", "fixed, %", "intervals")
    for row in [row for row in rows.read(RESULT) if row["machine"] == here]:
        intervals = "\n".join(
            f"{value:.3f} ({low:.3f} to {high:.3f}), {rounds} rounds, {reason}"
            for (low, value, high), rounds, reason in zip(row["intervals"], row["rounds"], row["ended_by"], strict=True)
        )
        fixed = f"{100 * row['fixed']:.2f}" if "fixed" in row else ""
        place = f"{row['runtime']} ({row['precision']})"
        covered = f"{row['covered']} of {row['n']}"
        table.add_row(row["kind"], place, f"{row['true']:g}", covered, f"{row['milliseconds']:.2f}", fixed, intervals)
    Console(width=150).print(table)


def main() -> None:
    """Measure what `bench/results/latency_intervals.json` does not have yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10, help="time limit per interval")
    parser.add_argument("--table", action="store_true", help="only print existing rows")
    chosen = parser.parse_args()
    if not chosen.table:
        torch.set_num_threads(2)
        with rows.alone():
            for experiment in TRUE:
                for runtime in installed_runtimes():
                    measure(experiment, runtime, chosen.repetitions, chosen.seconds)
    show()


if __name__ == "__main__":
    main()
