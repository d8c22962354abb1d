"""Compare post-training quantization with the peers: accuracy, size, time to make, latency, in one run.

Every artifact is made from the same network and the same calibration images, ten draws of them, and classifies all
10,000 test images in the runtime it is made for. Three draws cannot resolve a tenth of a percent: draws differ by more.
Latency is that of the first draw, interleaved: a ratio compares times of the same round, and below 1 the first is
faster. The same file against itself is the noise floor.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import peers
import rows
import tables
from images import IMAGENET, TRAINED, Subject, cifar, normalised
from tersor.core.target import Target
from tersor.deploy.onnx import export
from tersor.evaluation.latency import measure_latency, size_bytes
from tersor.evaluation.scoring import file_predictions
from tersor.evaluation.session import Array, Session, open_session
from tersor.methods.ptq import PTQ
from tersor.training.context import AttachContext
from trained_networks import subjects

RESULT = "ptq"
FOLDER = tempfile.TemporaryDirectory(prefix="tersor-ptq-")  # removed when the process ends


@dataclass(frozen=True)
class Made:
    """A file and the seconds it took: for calibration, and in total from the network in torch."""

    path: Path
    calibration: float
    total: float


@dataclass(frozen=True)
class Contender:
    """An artifact in a runtime; `precision` is the one requested for operators that are not quantized."""

    artifact: str
    runtime: str
    precision: str | None = None

    @property
    def label(self) -> str:
        """Return the label; FP32 in OpenVINO's default precision, which costs nothing, has its own."""
        return tables.DEFAULT_PRECISION if self.artifact == "fp32" and self.precision is None else self.artifact


QUANTIZED = (
    *(Contender(f"tersor for {runtime}", runtime) for runtime in ("onnxruntime", "openvino")),
    *(Contender("quantize_static", runtime) for runtime in ("onnxruntime", "openvino")),
    *(Contender("quantize_static, 7 bits", runtime) for runtime in ("onnxruntime", "openvino")),
    Contender("nncf", "openvino"),
)
FLOAT = (
    *(Contender("fp32", runtime, "float32") for runtime in ("onnxruntime", "openvino")),
    Contender("fp32", "openvino"),
)


def made_by_tersor(subject: Subject, runtime: Any, images: Tensor, path: Path) -> Made:
    """Quantize as a user would."""
    model = subject.network()
    start = time.perf_counter()
    attached = PTQ().attach(model, AttachContext(data=images.split(50), target=Target(runtime=runtime)))
    attached.begin()
    calibrated = time.perf_counter()
    export(attached.model, images, path)
    return Made(path, calibrated - start, time.perf_counter() - start)


@cache
def made(subject: Subject, artifact: str, seed: int) -> Made:
    """Make the artifact, once in this process."""
    path = Path(FOLDER.name) / f"{subject.name}-{artifact.replace(', ', '-').replace(' ', '-')}-{seed}.onnx"
    images = subject.calibration(seed)
    if artifact == "fp32":
        start = time.perf_counter()
        export(subject.network(), images, path)
        return Made(path, 0.0, time.perf_counter() - start)
    if artifact.startswith("tersor for "):
        return made_by_tersor(subject, artifact.removeprefix("tersor for "), images, path)
    float32 = made(subject, "fp32", 0)
    if artifact == "nncf":
        path = path.with_suffix(".xml")
        seconds = peers.nncf_post_training(float32.path, images, path)
    else:
        seconds = peers.onnxruntime_static(float32.path, images, path, reduce_range=artifact.endswith("7 bits"))
    return Made(path, seconds, float32.total + seconds)


@cache
def test_set() -> tuple[list[Array], Array]:
    """Return batches of images (500, 3, 32, 32), and all labels."""
    images = cifar().test
    return [batch.numpy() for batch in normalised(images)], images.targets.numpy()


@cache
def answers(subject: Subject, contender: Contender, seed: int) -> tuple[Array, str]:
    """Return the predicted classes of all test images, and the precision in use."""
    session = opened(subject, contender, seed)
    return file_predictions(session, test_set()[0]).numpy(), session.precision


def opened(subject: Subject, contender: Contender, seed: int = 0) -> Session:
    """Return a new session."""
    return open_session(made(subject, contender.artifact, seed).path, contender.runtime, precision=contender.precision)


def report_accuracy(subject: Subject, contender: Contender, draws: int, *, again: bool) -> None:
    """Write the row of one artifact in one runtime, over several draws of calibration images."""
    quantized = contender.artifact != "fp32"
    calibration = len(subject.calibration(0)) if quantized else 0
    identity = {
        "kind": "accuracy",
        "model": subject.name,
        "artifact": contender.label,
        "runtime": contender.runtime,
        "versions": tables.versions(),
        "calibration_images": calibration,
    }
    seeds = range(draws if quantized else 1)
    if not again and rows.known(RESULT, identity | {"n": len(seeds)}):
        return
    labels = test_set()[1]
    reference = answers(subject, Contender("fp32", contender.runtime, "float32"), 0)[0]
    drawn = [answers(subject, contender, seed)[0] for seed in seeds]
    files = [made(subject, contender.artifact, seed) for seed in seeds]
    accuracies = [100 * float(np.mean(answer == labels)) for answer in drawn]
    numbers = {
        "accuracy": statistics.mean(accuracies),
        "lost": 100 * float(np.mean(reference == labels)) - statistics.mean(accuracies),
        "accuracies": accuracies,
        "agreement": statistics.mean(100 * float(np.mean(answer == reference)) for answer in drawn),
        "test_images": len(labels),
        "precision": answers(subject, contender, 0)[1],
        "bytes": max(size_bytes(file.path) for file in files),
        "calibration_seconds": statistics.median(file.calibration for file in files),
        "artifact_seconds": statistics.median(file.total for file in files),
        "n": len(seeds),
        "spread": rows.spread(accuracies),
    }
    rows.add(RESULT, identity, numbers, seeds)
    print(f"{subject.name}, {contender.label} in {contender.runtime}: {numbers['accuracy']:.2f} %", flush=True)


def report_latency(subject: Subject, runtime: str, batch: int, seconds: float, *, again: bool) -> None:
    """Write the rows of one runtime and batch size: milliseconds of each, and tersor's ratio to each."""
    ours = f"tersor for {runtime}"
    entrants = [
        contender
        for contender in (*FLOAT, *QUANTIZED)
        if contender.runtime == runtime
        and contender.artifact != "quantize_static, 7 bits"  # different weights, same computation
    ]
    what = {"model": subject.name, "runtime": runtime, "batch": batch, "versions": tables.versions()}
    pairs = [(ours, entrant.label) for entrant in entrants if entrant.label != ours] + [(ours, f"{ours}, again")]
    identities = [{"kind": "ratio", "pair": " / ".join(pair), **what} for pair in pairs]
    if not again and all(rows.known(RESULT, identity) for identity in identities):
        return
    openers = {entrant.label: partial(opened, subject, entrant) for entrant in entrants}
    openers[f"{ours}, again"] = partial(opened, subject, Contender(ours, runtime))
    precisions = {label: opener().precision for label, opener in openers.items()}
    timings = measure_latency(
        openers,
        subject.calibration(0)[:1].numpy(),
        [batch],
        ratios=lambda timed, size: [timed.ratio(*pair, size) for pair in pairs],
        seconds=seconds,
    )
    for label, precision in precisions.items():
        spread = asdict(timings.spread(label, batch))
        identity = {"kind": "milliseconds", "artifact": label, **what}
        tables.add(RESULT, identity, "milliseconds", spread, {"precision": precision})
    for (first, second), identity in zip(pairs, identities, strict=True):
        tables.add_ratio(RESULT, identity, timings.ratio(first, second, batch), {})
    print(f"{subject.name} in {runtime}, batch {batch}: timed", flush=True)


def measure_accuracy(subject: Subject, draws: int, *, again: bool) -> None:
    """Measure the accuracy of one network in every form."""
    for contender in (*FLOAT, *QUANTIZED) if subject.trained else ():
        report_accuracy(subject, contender, draws, again=again)


def measure_latency_of(subject: Subject, batches: Sequence[int] | None, seconds: float, *, again: bool) -> None:
    """Measure the latency of one network in every form."""
    for runtime in ("onnxruntime", "openvino"):
        for batch in batches or ((1, 32, 128) if subject.trained else (1, 32)):
            report_latency(subject, runtime, batch, seconds, again=again)


def main() -> None:
    """Measure what `bench/results/ptq.json` does not have yet, and print all of it."""
    known = TRAINED | subjects() | IMAGENET
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(known), choices=list(known))
    parser.add_argument("--draws", type=int, default=10, help="draws of calibration images; seeds from 0")
    parser.add_argument("--batches", nargs="+", type=int, help="default: 1 32 128, or 1 32 at 224 pixels")
    parser.add_argument("--seconds", type=float, default=15, help="time limit per network, runtime and batch size")
    parser.add_argument("--only", choices=["accuracy", "latency"], help="default: both")
    parser.add_argument("--again", choices=["all", "latency"], help="measure existing rows again")
    parser.add_argument("--table", action="store_true", help="only print existing rows")
    chosen = parser.parse_args()
    if not chosen.table:
        torch.set_num_threads(2)
        with rows.alone():
            for name in chosen.models:
                if chosen.only != "latency":
                    measure_accuracy(known[name], chosen.draws, again=chosen.again == "all")
                if chosen.only != "accuracy":
                    measure_latency_of(known[name], chosen.batches, chosen.seconds, again=chosen.again is not None)
    tables.show(RESULT, chosen.models)


if __name__ == "__main__":
    main()
