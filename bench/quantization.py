"""Measure the accuracy of a trained ResNet-20 at few bits, method by method.

    ladder     post-training quantization, from min-max to QDrop, at few bits: three draws of 512 calibration images;
               also torchao (PT2E) and Brevitas, with the same images
    trained    quantization-aware training for 4 epochs: qat and lsq, also ptq, at equal bits; and from scratch
    packed     a ResNet-56 with 4-bit weights and with 8-bit weights: bytes, and latency in both runtimes
    depthwise  torchvision's MobileNetV2, trained for 15 epochs, in 8 bits, in both runtimes

Accuracy is on the test set after the last step, computed in torch, and for tersor also in ONNX Runtime from the
exported file. Newer rows of the ladder also have the KL divergence from the float network on the same images, which
depends less on which test images were drawn. A parameter that a row does not name has the method's default; defaults
were chosen on validation images, never here.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import peers
import rows
import tables
import training
from images import MEAN, STD, TRAINED, cifar, normalised
from tersor.core.target import Target
from tersor.data import Batches
from tersor.deploy.onnx import export
from tersor.evaluation.latency import measure_latency, size_bytes
from tersor.evaluation.scoring import file_predictions
from tersor.evaluation.session import open_session
from tersor.methods.adaround import AdaRound
from tersor.methods.brecq import BRECQ
from tersor.methods.ptq import PTQ
from tersor.training.context import AttachContext
from tersor.training.method import Method

RESULT = "quantization"
SEEDS = (0, 1, 2)
WIDTHS = ((4, 8), (4, 4), (3, 8), (2, 8))
"""Bits of the weights and of the activations; the first and the last layer have 8."""
TRAINED_WIDTH, BESIDE = (2, 2), ("min-max", "+ spread correction", "adaround", "qdrop")
"""Widths of quantization-aware training that the ladder lacks: its methods there, with one draw."""
EPOCHS = 4
PARTS = ("packed", "ladder", "trained", "depthwise")
_UNCORRECTED: dict[str, Any] = {"bias_correction": False, "variance_correction": False}
MINMAX: dict[str, Any] = {"weight_range": "minmax", "activation_range": "minmax", **_UNCORRECTED}
MSE: dict[str, Any] = {"weight_range": "mse", "activation_range": "mse", **_UNCORRECTED}
CORRECTED: dict[str, Any] = {"equalize": True, "bias_correction": True}


def _ptq(**options: Any) -> Callable[[int, int], Method]:
    return lambda bits, activation_bits: PTQ(bits=bits, activation_bits=activation_bits, **options)


LADDER: dict[str, Callable[[int, int], Method]] = {
    "min-max": _ptq(**MINMAX),
    "mse, of activations": _ptq(**MSE | {"weight_range": "minmax"}),
    "mse, of activations + equalisation, bias correction": _ptq(**MSE | CORRECTED | {"weight_range": "minmax"}),
    "mse": _ptq(**MSE),
    "+ equalisation, bias correction": _ptq(**MSE | CORRECTED),
    "ptq": _ptq(),
    "+ spread correction": _ptq(**MSE | {"equalize": True, "variance_correction": True}),
    "adaround": lambda bits, activation_bits: AdaRound(bits=bits, activation_bits=activation_bits),
    "brecq": lambda bits, activation_bits: BRECQ(bits=bits, activation_bits=activation_bits),
    "qdrop": lambda bits, activation_bits: BRECQ(bits=bits, activation_bits=activation_bits, drop=0.5),
}

RUNGS = (
    "min-max",
    "mse, of activations",
    "mse, of activations + equalisation, bias correction",
    "ptq",
    "adaround",
    "brecq",
    "qdrop",
)
"""The ladder from bottom to top; other entries are for comparison."""

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


PEERS: dict[str, Callable[[nn.Module, Tensor, int, int], nn.Module]] = {
    "torchao, PT2E": peers.torchao_post_training,
    "brevitas": partial(peers.brevitas_post_training, gptq=False),
    "brevitas, GPTQ": partial(peers.brevitas_post_training, gptq=True),
}


@cache
def _test() -> Batches:
    return Batches(cifar().test, 500, mean=MEAN, std=STD)


@torch.no_grad()
def _answers(model: nn.Module) -> Tensor:
    """Return the logits of the test set (10000, 10) in torch; networks of PT2E have no `eval`."""
    return torch.cat([model(batch.images.contiguous()) for batch in _test()])


@cache
def _in_float() -> Tensor:
    """Return the original network's log-probabilities (10000, 10)."""
    return _answers(TRAINED["resnet20"].network()).log_softmax(1)


def _by_runtime(model: nn.Module, runtime: Any = "onnxruntime") -> float:
    """Return the test accuracy of the exported file in the runtime, in percent."""
    images, labels = normalised(cifar().test), cifar().test.targets.numpy()
    with tempfile.TemporaryDirectory() as made:
        session = open_session(export(model, images[0], Path(made) / "model.onnx"), runtime)
        return 100 * float((file_predictions(session, [batch.numpy() for batch in images]).numpy() == labels).mean())


def ladder(rung: str, bits: int, activation_bits: int, seed: int) -> None:
    """Write the row of one method, width and draw of calibration images."""
    identity = {"kind": "ladder", "rung": rung, "bits": bits, "activation_bits": activation_bits, "seed": seed}
    if rows.known(RESULT, identity, anywhere=True):
        return
    images = Batches(cifar().train, 64, mean=MEAN, std=STD, shuffle=True, seed=seed)
    network = TRAINED["resnet20"].network()
    begun = time.perf_counter()
    if rung in PEERS:
        drawn = torch.cat([batch.images.contiguous() for batch, _ in zip(images, range(8), strict=False)])
        model = PEERS[rung](network, drawn, bits, activation_bits)
    else:
        network.to("cuda" if torch.cuda.is_available() else "cpu")
        attached = LADDER[rung](bits, activation_bits).attach(
            network, AttachContext(data=images, target=Target(cpu="vnni"))
        )
        attached.begin()
        model = attached.model.cpu()
    seconds = time.perf_counter() - begun
    answers, before = _answers(model), _in_float()
    reached = 100 * float((answers.argmax(1) == cifar().test.targets).double().mean())
    divergence = float((before.exp() * (before - answers.log_softmax(1))).sum(1).mean())
    numbers: dict[str, Any] = {"accuracy": reached, "divergence": divergence, "seconds": seconds}
    numbers |= {"n": 1, "spread": rows.spread([reached])}
    if rung in PEERS:
        numbers["version"] = tables.version(rung.split(",")[0])
    else:
        numbers["accuracy_in_onnxruntime"] = _by_runtime(model)
    rows.add(RESULT, identity, numbers, [seed])
    print(f"W{bits}A{activation_bits}, {rung}, draw {seed}: {reached:.2f} %, {seconds:.0f} s", flush=True)


def trained(name: str, *, again: bool) -> None:
    """Write the row of one training run; `again`: also if only another machine has one."""
    identity = {"kind": "trained", "contender": name, "epochs": EPOCHS}
    if rows.known(RESULT, identity, anywhere=not again):
        return
    wanted = TRAINING[name]
    stage = {
        "epochs": EPOCHS,
        "optimizer": {"learning_rate": 0.1 if wanted.get("scratch") else 0.01},
        "methods": wanted["methods"],
    }
    teacher = "original" if any("soft_targets" in each for each in wanted["methods"]) else None
    given = training.recipe(stage, scratch=bool(wanted.get("scratch")), teacher=teacher)
    experiment, told = training.walked(given, RESULT)
    reached = training.accuracy_on_test(experiment)
    numbers = {"accuracy": reached, "minutes": told["minutes"], "precision": told["precision"], "n": 1}
    rows.add(RESULT, identity, {**numbers, "spread": rows.spread([reached])}, [0])
    print(f"{name}: {reached:.2f} %, {told['minutes']:.1f} minutes", flush=True)


def depthwise() -> None:
    """Write the rows of a MobileNetV2: in float, and in 8 bits, in each runtime."""
    what = {"kind": "depthwise", "model": "mobilenet_v2", "epochs": 15}
    wanted = [{**what, "bits": bits, "runtime": runtime} for bits in (32, 8) for runtime in ("onnxruntime", "openvino")]
    if all(rows.known(RESULT, identity) for identity in wanted):
        return
    stage = {"epochs": 15, "optimizer": {"learning_rate": 0.05}}
    experiment, told = training.walked(training.recipe(stage, network="mobilenet_v2", scratch=True), RESULT)
    images = next(iter(Batches(cifar().train, 512, mean=MEAN, std=STD, shuffle=True, seed=0))).images.contiguous()
    for identity in wanted:
        network = copy.deepcopy(experiment.model)
        if identity["bits"] == 8:
            attached = PTQ().attach(
                network, AttachContext(data=images.split(64), target=Target(runtime=identity["runtime"]))
            )
            attached.begin()
            network = attached.model
        reached = _by_runtime(network, identity["runtime"])
        numbers = {"accuracy": reached, "minutes": told["minutes"], "n": 1, "spread": rows.spread([reached])}
        rows.add(RESULT, identity, numbers, [0])
        print(f"mobilenet_v2, {identity['bits']} bits, {identity['runtime']}: {reached:.2f} %", flush=True)


def packed(batches: Sequence[int] = (1, 32, 128)) -> None:
    """Write the rows of a ResNet-56 with 4-bit weights compared with 8-bit weights."""
    subject = TRAINED["resnet56"]
    with tempfile.TemporaryDirectory() as made:
        for runtime in ("onnxruntime", "openvino"):
            what = {"kind": "packed", "runtime": runtime, "versions": tables.versions()}
            if all(rows.known(RESULT, {**what, "batch": batch}) for batch in batches):
                continue
            files = {bits: _exported(subject.network(), bits, runtime, Path(made)) for bits in (4, 8)}
            openers = {str(bits): partial(open_session, path, runtime) for bits, path in files.items()}
            openers["8, again"] = openers["8"]
            timings = measure_latency(openers, subject.calibration(0)[:1].numpy(), batches)
            for batch in batches:
                ratio, noise = timings.ratio("4", "8", batch), timings.ratio("8, again", "8", batch)
                numbers = {
                    "bytes": [size_bytes(files[bits]) for bits in (4, 8)],
                    "ratio": ratio.value,
                    "noise": [noise.low, noise.value, noise.high],
                    "n": ratio.n,
                    "spread": {"low": ratio.low, "high": ratio.high},
                }
                rows.add(RESULT, {**what, "batch": batch}, numbers, [0])
                print(f"4 bits / 8 bits, {runtime}, batch {batch}: {ratio.value:.3f}", flush=True)


def _exported(model: nn.Module, bits: int, runtime: Any, made: Path) -> Path:
    images = TRAINED["resnet56"].calibration(0)
    attached = PTQ(bits=bits).attach(model, AttachContext(data=images.split(50), target=Target(runtime=runtime)))
    attached.begin()
    return export(attached.model, images, made / f"{runtime}-{bits}.onnx")


def _of(kind: str) -> Iterator[rows.Row]:
    return (row for row in rows.read(RESULT) if row["kind"] == kind)


def _steps(number: str, digits: int) -> Table:
    """Return the gain of each step over the one before, by draw of calibration images."""
    heads = (f"W{bits}A{activation_bits}" for bits, activation_bits in WIDTHS)
    title = f"{number} less that of the rung before: mean, its standard error over draws, and how many draws"
    table = Table("rung", *heads, title=title)
    reached = {
        (row["rung"], row["bits"], row["activation_bits"], row["seed"]): row[number]
        for row in _of("ladder")
        if number in row
    }
    drawn = sorted({row["seed"] for row in _of("ladder")})
    for before, rung in itertools.pairwise(RUNGS):
        cells: list[str] = []
        for width in WIDTHS:
            known = [seed for seed in drawn if {(before, *width, seed), (rung, *width, seed)} <= reached.keys()]
            gained = [reached[rung, *width, seed] - reached[before, *width, seed] for seed in known]
            error = statistics.stdev(gained) / math.sqrt(len(gained)) if len(gained) > 1 else math.nan
            cells.append(
                f"{statistics.mean(gained):+.{digits}f} +- {error:.{digits}f}, {len(gained)}" if gained else ""
            )
        table.add_row(rung, *cells)
    return table


def show() -> None:
    """Print the rows."""
    widths = (*WIDTHS, TRAINED_WIDTH)
    table = Table("rung", *(f"W{bits}A{activation_bits}" for bits, activation_bits in widths), title="ResNet-20, test")
    for rung in (*LADDER, *PEERS):
        cells: list[str] = []
        for width in widths:
            mine = [row for row in _of("ladder") if (row["bits"], row["activation_bits"]) == width]
            # only draws that every method has
            reached = [row["accuracy"] for row in mine if row["rung"] == rung and row["seed"] in SEEDS]
            cells.append(
                f"{statistics.mean(reached):.2f} ({min(reached):.2f} to {max(reached):.2f})" if reached else ""
            )
        table.add_row(rung, *cells)
    Console(width=160).print(table)
    Console(width=160).print(_steps("accuracy", 2))
    Console(width=160).print(_steps("divergence", 4))
    table = Table("training", "accuracy", "minutes", "on", title=f"{EPOCHS} epochs")
    for row in _of("trained"):
        where = row["machine"]["gpu"] or row["machine"]["cpu"]
        table.add_row(row["contender"], f"{row['accuracy']:.2f}", f"{row['minutes']:.1f}", where)
    Console(width=140).print(table)
    table = Table("runtime", "bits", "accuracy", title="MobileNetV2, depthwise")
    for row in _of("depthwise"):
        table.add_row(row["runtime"], str(row["bits"]), f"{row['accuracy']:.2f}")
    Console(width=140).print(table)
    table = Table("runtime", "batch", "bytes, 4 and 8 bits", "4 bits / 8 bits", "interval", "8 / 8", title="packed")
    for row in _of("packed"):
        (low, high), noise = row["spread"].values(), f"{row['noise'][0]:.2f} to {row['noise'][2]:.2f}"
        told = f"{row['ratio']:.3f}", f"{low:.2f} to {high:.2f}", noise
        table.add_row(row["runtime"], str(row["batch"]), " and ".join(map(str, row["bytes"])), *told)
    Console(width=140).print(table)


def main() -> None:
    """Measure what `bench/results/quantization.json` does not have yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["ladder", "trained", "packed", "depthwise"], help="default: all")
    parser.add_argument("--draws", type=int, default=len(SEEDS), help="draws of calibration images for the ladder")
    parser.add_argument(
        "--again",
        nargs="+",
        default=[],
        choices=list(TRAINING),
        help="training runs to repeat although another machine has rows",
    )
    parser.add_argument("--table", action="store_true", help="only print existing rows")
    chosen = parser.parse_args()
    parts = chosen.only or PARTS
    if not chosen.table:
        with rows.alone():
            if "packed" in parts:
                packed()
            for seed in range(chosen.draws) if "ladder" in parts else ():
                for bits, activation_bits in WIDTHS:
                    for rung in (*LADDER, *PEERS):
                        ladder(rung, bits, activation_bits, seed)
            for rung in BESIDE if "ladder" in parts else ():
                ladder(rung, *TRAINED_WIDTH, SEEDS[0])
            for name in TRAINING if "trained" in parts else ():
                trained(name, again=name in chosen.again)
            if "depthwise" in parts:
                depthwise()
    show()


if __name__ == "__main__":
    main()
