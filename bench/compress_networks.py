"""`tersor compress` on other networks than a ResNet: a MobileNetV2 on CIFAR-10, and a UNet on the bundled scenes.

The networks are those of `bench/trained_networks.py` and `bench/tasks.py`, which train them where they are missing.
Each row has the metric of the original and of `model.onnx` on the test images, and names the network that was found.
Further rows have the latency of the original in 8 bits, in each runtime, over that of `model.onnx`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

import compress
import rows
import tables
import task_networks
import tasks
import tersor
import trained_networks
from images import cifar, folder
from tersor.core.target import Runtime
from tersor.data import Batches, Splits
from tersor.evaluation.latency import measure_latency
from tersor.evaluation.multiply_peak import INTEGERS
from tersor.evaluation.session import open_session
from tersor.evaluation.timings import Ratio
from tersor.search.compression_budget import Budget
from tersor.search.result import Result

RESULT = "compress"


@dataclass(frozen=True)
class Subject:
    """A trained network and its images.

    Attributes:
        model: name of the function that builds it.
        weights: trains the network if necessary, and returns the path of its weights.
        data: returns its images, as a search takes them.
        splits: returns the same images.
        task: what the network is for.
        seconds: time for the latency of each batch size.
    """

    model: str
    weights: Callable[[], Path]
    data: Callable[[], Path | str]
    splits: Callable[[], Splits]
    task: str
    seconds: float


def _mobilenet_weights() -> Path:
    name = "mobilenet_v2_half"
    if not trained_networks.weights(name).exists():
        trained_networks.train(name)
    return trained_networks.weights(name)


def _unet_weights() -> Path:
    return tasks.trained(task_networks.SUBJECTS["segmentation"], 0) / "model.safetensors"


SUBJECTS = {
    "mobilenet_v2_half": Subject(
        "trained_networks:mobilenet_v2", _mobilenet_weights, folder, cifar, "classification", 20.0
    ),
    "unet": Subject("task_networks:unet", _unet_weights, lambda: "scenes", task_networks.scenes, "segmentation", 40.0),
}


def measure(name: str, drop: float, minutes: float, runtime: Runtime) -> None:
    """Search, and write a row of the metrics and one of each latency ratio."""
    identity = {"kind": "network", "model": name, "drop": drop, "minutes": minutes, "runtime": runtime, "seed": 0}
    if rows.known(RESULT, identity):
        return
    subject = SUBJECTS[name]
    result = tersor.compress(
        subject.model,
        subject.data(),
        weights=subject.weights(),
        budget=Budget(max_drop=drop, minutes=minutes),
        runtime=runtime,
        task=subject.task,
        mean=subject.splits().mean,
        std=subject.splits().std,
        out=folder().parent / "compress" / f"{name}-drop{drop:g}-{minutes:g}min-{runtime}",
        progress=compress.Progress(),
    )
    print(result, flush=True)
    for size, baseline, ratio in _ratios(subject, result, runtime):
        pair = f"original in 8 bits, {baseline} / {compress.OURS}"
        tables.add_ratio(RESULT, {**identity, "kind": "network ratio", "pair": pair, "batch": size}, ratio, {})
    original = result.numbers.point(result.numbers.original)
    numbers = {"original": original.test, "metric": result.best.point.test, **compress.outcome(result)}
    rows.add(RESULT, identity, numbers, [0])


def _ratios(subject: Subject, result: Result, runtime: Runtime) -> list[tuple[int, str, Ratio]]:
    """By batch size and runtime: the latency of the original in 8 bits over that of `model.onnx`."""
    images = subject.splits()
    first = next(iter(Batches(images.test, 1, mean=images.mean or (), std=images.std or ()))).only_images
    openers = {compress.OURS: partial(open_session, result.best.file, runtime)}
    for point in result.numbers.baselines:
        if point.precision == INTEGERS:
            openers[point.runtime] = partial(open_session, result.folder / point.file, point.runtime)
    others = [each for each in openers if each != compress.OURS]
    sizes = sorted(result.best.point.latency_ms)
    timings = measure_latency(
        openers,
        np.ascontiguousarray(first.numpy()),
        sizes,
        ratios=lambda timed, size: [timed.ratio(timed.fastest(others, size), compress.OURS, size)],
        seconds=subject.seconds,
    )
    return [(size, other, timings.ratio(other, compress.OURS, size)) for size in sizes for other in others]


def show() -> None:
    """Print the rows of this machine."""
    for row in rows.read(RESULT):
        if row["machine"] == rows.machine() and row["kind"] in {"network", "network ratio"}:
            Console(width=170).print(json.dumps({key: row[key] for key in row if key not in {"machine", "versions"}}))


def main() -> None:
    """Measure what `bench/results/compress.json` does not have yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--drop", type=float, default=1.0)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--runtimes", nargs="+", default=["openvino"])
    parser.add_argument("--table", action="store_true", help="only print existing rows")
    chosen = parser.parse_args()
    if not chosen.table:
        with rows.alone():
            for name in chosen.networks:
                for runtime in chosen.runtimes:
                    measure(name, chosen.drop, chosen.minutes, runtime)
    show()


if __name__ == "__main__":
    main()
