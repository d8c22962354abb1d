"""Compress a detector that is trained from scratch on 205 photographs of blood cells, and measure mAP50 and latency.

Torchvision's FCOS on a ResNet-18 is trained, then quantized to 8 bits, or half of its MACs are removed and it is
fine-tuned with the boxes for ten epochs, or both. The last epoch counts. Lengths and learning rates were set before the
first test; the test images only report. The latency is that of the whole detector: a file in its runtime, and
torchvision's post-processing in torch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import peers
import rows
import tables
import tersor
import training
from detection_network import SIZE, CellDetection, Convolutions, cells, found
from tasks import RUNTIMES, Runtime, kept
from tersor.data import Batches, Images
from tersor.evaluation.costs import costs
from tersor.evaluation.latency import measure_latency
from tersor.evaluation.scoring import agreement, file_predictions, network_score, score, targets_of
from tersor.evaluation.session import Array, Session, open_session
from tersor.recipe import Recipe

RESULT = "detection"
EPOCHS, FINE_TUNING = 40, 10
KEEP = 0.5
DRAWS, CALIBRATION = 3, 128
"""Draws of calibration images."""
PEER: dict[Runtime, str] = {"onnxruntime": "quantize_static", "openvino": "nncf"}
AUGMENT: list[Any] = [
    "RandomHorizontalFlip",
    "RandomVerticalFlip",
    {"RandomAffine": {"degrees": 0, "translate": [0.1, 0.1], "scale": [0.75, 1.33]}},
    {"ColorJitter": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2}},
]


def recipe(stage: dict[str, Any], learning_rate: float, seed: int, weights: Path | None = None) -> Recipe:
    """Return one stage of training, from random weights or from a file."""
    model = {"name": "detection_network:Convolutions"}
    optimizer = {"name": "adamw", "learning_rate": learning_rate, "weight_decay": 0.01}
    options = {"batch_size": 8, "clip_norm": 10.0, "precision": "bfloat16", "lr_schedule": {"warmup_epochs": 1}}
    return Recipe.model_validate(
        {
            "task": "detection_network:CellDetection",
            "model": model if weights is None else {**model, "weights": weights},
            "data": {"name": "detection_network:cells", "augment": AUGMENT},
            "seed": seed,
            "checkpoint_every": 25,
            "stages": [{"name": "train", "optimizer": optimizer, **options, **stage}],
        }
    )


@cache
def trained(seed: int, *, halved: bool) -> Path:
    """Return the folder of the trained detector, or of the fine-tuned one with half of its MACs."""
    made = recipe({"epochs": EPOCHS}, 0.001, seed)
    if halved:
        stage = {"epochs": FINE_TUNING, "methods": [{"channel_pruning": {"keep_macs": KEEP}}]}
        made = recipe(stage, 0.0003, seed, trained(seed, halved=False) / "model.safetensors")
    return kept(made, f"{RESULT} {SIZE}", lambda: training.walked(made, RESULT, cells())[0].model)


@cache
def network(seed: int, *, halved: bool) -> nn.Module:
    """Return the detector in eval mode."""
    return tersor.load(Convolutions(), trained(seed, halved=halved)).eval()


def batches(images: Images, size: int, **options: Any) -> Batches:
    """Return batches of normalized images."""
    data = cells()
    assert data.mean is not None
    assert data.std is not None
    return Batches(images, size, mean=data.mean, std=data.std, **options)


def calibration(seed: int) -> Tensor:
    """Return training images (N, 3, H, W) that are not augmented."""
    return next(iter(batches(cells().train, CALIBRATION, shuffle=True, seed=seed))).images.contiguous()


def files(seed: int, maker: str, runtime: Runtime, scratch: Path, *, halved: bool) -> Iterator[Path]:
    """Write the file of a detector: in float32, or in 8 bits for each draw of calibration images."""
    model, float32 = network(seed, halved=halved), scratch / f"float32-{halved}.onnx"
    tersor.export(model, calibration(0)[:8], float32, runtime=runtime)
    if maker == "float32":
        yield float32
        return
    for draw in range(DRAWS):
        images, path = calibration(1000 + draw), scratch / f"{maker}-{halved}-{draw}.onnx"
        if maker == "tersor":
            quantized = tersor.quantize(model, images.split(32), runtime=runtime, task=CellDetection())
            tersor.export(quantized, images[:8], path, runtime=runtime)
        else:
            path = peers.post_training(maker, float32, images, path)
        yield path


def predictions(path: Path, runtime: Runtime, *, float32: bool) -> Any:
    """Return the boxes that a file finds in the test images."""
    session = open_session(path, runtime, precision="float32" if float32 else None)
    arrays = (batch.images.contiguous().numpy() for batch in batches(cells().test, 24))
    return file_predictions(session, arrays, CellDetection())


@cache
def of_original(seed: int, runtime: Runtime) -> Any:
    """Return the boxes of the original in float32."""
    with tempfile.TemporaryDirectory() as scratch:
        (path,) = files(seed, "float32", runtime, Path(scratch), halved=False)
        return predictions(path, runtime, float32=True)


def identity(seed: int, runtime: Runtime) -> dict[str, Any]:
    """Return what all rows of a detector share."""
    return {"network": "FCOS (ResNet-18)", "size": list(SIZE), "runtime": runtime, "seed": seed, "epochs": EPOCHS}


def macs(model: nn.Module, part: str = "") -> int:
    """Return the MACs of all layers whose paths begin with `part`."""
    return sum(layer.macs for layer in costs(model, calibration(0)[:1]).layers if layer.name.startswith(part))


def report(seed: int, maker: str, runtime: Runtime, *, halved: bool) -> None:
    """Write one row: mAP50 on all test images, and what was lost."""
    what = identity(seed, runtime) | {"halved": halved, "weights": maker, "versions": tables.versions()}
    if rows.known(RESULT, what):
        return
    task, targets, reference = CellDetection(), targets_of(batches(cells().test, 24)), of_original(seed, runtime)
    before, after, size = score(task, reference, targets), list[Any](), 0
    with tempfile.TemporaryDirectory() as scratch:
        for path in files(seed, maker, runtime, Path(scratch), halved=halved):
            after.append(predictions(path, runtime, float32=maker == "float32"))
            size = sum(each.stat().st_size for each in path.parent.glob(f"{path.stem}.*"))
    scores = [score(task, each, targets) for each in after]
    small, whole = network(seed, halved=halved), network(seed, halved=False)
    by_class = [task.score_by_class([(each, targets)], len(cells().classes)) for each in after]
    numbers = {
        "score": statistics.mean(scores),
        "lost": before - statistics.mean(scores),
        "validation": network_score(small, batches(cells().validation, 29), task) if maker == "float32" else None,
        "by_class": torch.stack(by_class).mean(0)[1:].tolist(),
        "agreement": statistics.mean(agreement(task, each, reference) for each in after),
        "macs_ratio": macs(small) / macs(whole),
        "backbone_macs_ratio": macs(small, "backbone.") / macs(whole, "backbone."),
        "bytes": size,
        "test_images": len(cells().test),
    }
    rows.add(RESULT, what, {**numbers, "n": len(scores), "spread": rows.spread(scores)}, [seed])
    print(
        f"{seed}, halved: {halved}, {maker}, {runtime}: {numbers['score']:.2f}, lost {numbers['lost']:.2f}", flush=True
    )


def with_post_processing(path: Path, runtime: Runtime) -> Session:
    """Return a session that also decodes the boxes and suppresses those that are not maxima."""
    session = open_session(path, runtime)

    def infer(array: Array) -> Array:
        outputs = {name: torch.from_numpy(value) for name, value in session.run_all(array).items()}
        return found(outputs)[0]["boxes"].numpy()

    return replace(session, infer=infer, infer_all=None)


def latency(seed: int, runtime: Runtime, seconds: float) -> None:
    """Write two rows: four files at the runtime's default precision in interleaved rounds, alone and as detectors."""
    image = np.ascontiguousarray(next(iter(batches(cells().test, 1))).images.numpy())
    for timed, opened in (("file", open_session), ("file and post-processing", with_post_processing)):
        what = identity(seed, runtime) | {"latency": timed, "versions": tables.versions()}
        if rows.known(RESULT, what):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            openers = {
                f"{'half of the MACs' if halved else 'original'}, {maker}": partial(
                    opened, next(files(seed, maker, runtime, Path(scratch), halved=halved)), runtime
                )
                for halved in (False, True)
                for maker in ("float32", "tersor")
            }
            timings = measure_latency(openers, image, [1], seconds=seconds)
        first, *others = openers
        ratios = {name: asdict(timings.ratio(name, first, 1)) for name in others}
        milliseconds = {name: asdict(timings.spread(name, 1)) for name in openers}
        spread = {key: milliseconds[first][key] for key in ("p10", "p90")}
        numbers = {"milliseconds": milliseconds, "ratio": ratios, "n": milliseconds[first]["n"], "spread": spread}
        rows.add(RESULT, what, numbers, [seed])
        print(runtime, timed, {name: round(each["value"], 3) for name, each in ratios.items()}, flush=True)


def show() -> None:
    """Print all rows."""
    table = Table("size", "runtime", "seed", "half of the MACs", "weights", "mAP50", "lost", "n", "MACs", "backbone")
    for row in rows.read(RESULT):
        if "score" in row:
            keys = ("score", "lost", "n", "macs_ratio", "backbone_macs_ratio")
            names = [str(row[key]) for key in ("size", "runtime", "seed", "halved", "weights")]
            table.add_row(*names, *(f"{row[key]:.2f}" for key in keys))
    Console(width=150).print(table)


def main() -> None:
    """Measure what `bench/results/detection.json` does not have yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--seconds", type=float, default=30, help="time limit of the latency in each runtime")
    parser.add_argument("--table", action="store_true", help="only print existing rows")
    chosen = parser.parse_args()
    if not chosen.table:
        rows.commit()  # read now: the checkout may change within hours
        for halved in (False, True):
            for runtime in RUNTIMES:
                for maker in ("float32", "tersor", PEER[runtime]):
                    report(chosen.seed, maker, runtime, halved=halved)
        with rows.alone():
            for runtime in RUNTIMES:
                latency(chosen.seed, runtime, chosen.seconds)
    show()


if __name__ == "__main__":
    main()
