"""What other ways reach in the same minutes as a search: each contender is trained for all of the time, and timed.

    python bench/compress_contenders.py "13 branches removed" --minutes 45

All have the same teacher, losses, optimizer and images as a search (`tersor.search.training_stage`). torch-pruning's
networks are quantized by NNCF (OpenVINO) or `quantize_static` (ONNX Runtime), all others by tersor. `accuracy` is that
of the half of the test images that `bench/compress.py` uses for its results. Each row names the points of the search's
front that the contender dominates, and those that dominate it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import compress
import peers
import rows
from equal_time import stage as recipe_stage
from equal_time import torch_pruned
from images import TRAINED, folder
from tersor.core.device import keep_freed_memory
from tersor.core.progress import NO_PROGRESS, NullProgress
from tersor.core.target import Runtime
from tersor.deploy.onnx import export
from tersor.evaluation.session import open_session
from tersor.models import build
from tersor.pipeline.stages import attach
from tersor.recipe import Stage
from tersor.search.candidate import Candidate
from tersor.search.candidate_latency import Measurement
from tersor.search.folder import read_front
from tersor.search.front import Point, dominates
from tersor.search.request import Request, experiment_of
from tersor.search.search_metric import of_file
from tersor.search.training_stage import training_stage
from tersor.search.workbench import Workbench
from tersor.training.loop import fit

RESULT = "compress"
FAMILY = "wide_plain_48"
TORCH_PRUNING = "torch-pruning"
MOST_STEPS = 100_000
RESERVED = 30.0
"""Seconds for quantization and export."""


def contenders(bench: Workbench) -> dict[str, tuple[Callable[[], nn.Module], bool]]:
    """Functions that build the networks, by name, and whether their weights are random."""
    made: dict[str, tuple[Callable[[], nn.Module], bool]] = {
        f"{TORCH_PRUNING}, {ratio}": (partial(torch_pruned, ratio, 8), False) for ratio in (0.5, 0.7)
    }
    made |= {
        f"{count} branches removed": (partial(bench.build, Candidate(branches=count)), False) for count in (9, 13, 18)
    }
    return made | {
        "the recipe": (compress.SUBJECT.network, False),
        "resnet20, trained": (TRAINED["resnet20"].network, False),
        "resnet20, from scratch": (partial(build, "resnet20", 10), True),
        f"{FAMILY}, from scratch": (partial(build, FAMILY, 10), True),
    }


def trained(bench: Workbench, name: str, seconds: float) -> nn.Module:
    """The network of a contender after this time, the time to build it included."""
    start = time.monotonic()
    make, fresh = contenders(bench)[name]
    experiment, model = bench.experiment, make()
    stage = training_stage(experiment, "train", MOST_STEPS, model, fresh=fresh, settled=False)
    if name == "the recipe":
        stage = Stage(**{**recipe_stage().model_dump(), "steps": MOST_STEPS})
    attachment = attach(experiment, stage, model, NO_PROGRESS)
    attachment.begin()
    left = seconds - RESERVED - (time.monotonic() - start)
    batches = experiment.training_batches(stage)
    fit(attachment, batches, stage, steps=MOST_STEPS, teacher=experiment.teacher, seed=experiment.recipe.seed,
        seconds=left)  # fmt: skip
    attachment.finish()
    return attachment.model


def written(bench: Workbench, name: str, model: nn.Module, runtime: Runtime, path: Path) -> Path:
    """The file of a trained contender in 8 bits."""
    if not name.startswith(TORCH_PRUNING):
        return bench.export(Candidate(), model, path / "int8.onnx").file
    images = compress.SUBJECT.calibration(0)
    float32 = export(model, images, path / "float32.onnx")
    if runtime == "openvino":
        peers.nncf_post_training(float32, images, path / "int8.xml")
        return path / "int8.xml"
    peers.onnxruntime_static(float32, images, path / "int8.onnx")
    return path / "int8.onnx"


def measure(name: str, minutes: float, runtime: Runtime, seed: int) -> None:
    """Train and measure one contender; write its row."""
    identity = {"kind": "contender", "contender": name, "minutes": minutes, "runtime": runtime, "seed": seed}
    if rows.known(RESULT, identity):
        return
    request = Request(compress.SUBJECT.name, folder(), compress.WEIGHTS, runtime, (), (), None, None, seed,
                      "classification")  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch)
        bench = Workbench(experiment_of(request, NullProgress()), {}, path, NO_PROGRESS).choosing_on_test_images()
        file = written(bench, name, trained(bench, name, 60 * minutes), runtime, path)
        experiment = bench.experiment
        test = experiment.batches(experiment.data.test, experiment.evaluation_batch)
        accuracy = of_file(file, runtime, test, experiment).metric
        latency = _latency(bench, file, runtime, path)
        size = file.stat().st_size + sum(each.stat().st_size for each in path.glob("int8.bin"))
    numbers: dict[str, Any] = {"accuracy": accuracy, "milliseconds": {str(key): ms for key, ms in latency.items()},
                               "bytes": size, "n": 1, "spread": rows.spread([accuracy])}  # fmt: skip
    rows.add(RESULT, identity, numbers | _dominance(accuracy, latency, size, minutes, runtime, seed), [seed])


def _latency(bench: Workbench, file: Path, runtime: Runtime, path: Path) -> dict[int, float]:
    """Milliseconds by batch size, in rounds with the original as in a search."""
    original = bench.write(bench.experiment, bench.experiment.model, path / "original.onnx").file
    example = next(iter(bench.validation)).images[:1].numpy()
    measurement = Measurement(path / "latencies.json", runtime, example, compress.BATCHES, seconds=10)
    openers = {"original": partial(open_session, original, runtime)}
    openers["file"] = partial(open_session, file, runtime)
    return measurement.baselines(openers, "original")["file"].ms


def _dominance(
    accuracy: float, latency: dict[int, float], size: int, minutes: float, runtime: Runtime, seed: int
) -> dict[str, Sequence[str]]:
    """Points of the searches with this time that the contender dominates, and those that dominate it."""
    found: dict[str, list[str]] = {"dominates": [], "dominated_by": []}
    for front in folder().parent.glob(f"compress/drop*-{minutes:g}min-{runtime}-{seed}"):
        for point in read_front(front).points:
            ours = point.model_copy(update={"validation": point.test or point.validation})
            theirs = Point(
                name="", description="", file="", runtime=runtime, precision="int8", validation=accuracy,
                latency_ms=latency, bytes=size, macs=0,
            )  # fmt: skip
            if dominates(theirs, ours):
                found["dominates"].append(f"{front.name}: {point.description}")
            if dominates(ours, theirs):
                found["dominated_by"].append(f"{front.name}: {point.description}")
    return {key: list(names) for key, names in found.items()}


def main() -> None:
    """Measure the contenders that are named, or list all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", help="names; none: all")
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--runtime", default="openvino")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    keep_freed_memory()
    names = [f"{TORCH_PRUNING}, 0.5", f"{TORCH_PRUNING}, 0.7", "9 branches removed", "13 branches removed",
             "18 branches removed", "the recipe", "resnet20, trained", "resnet20, from scratch",
             f"{FAMILY}, from scratch"]  # fmt: skip
    with rows.alone():
        for name in chosen.contenders or names:
            measure(name, chosen.minutes, chosen.runtime, chosen.seed)
    compress.show()


if __name__ == "__main__":
    main()
