"""Choose the defaults of PTQ on training images that were not used for calibration, never on test images.

For each option, placement and draw of calibration images: the mean squared difference of the logits from FP32, relative
to their mean square, and the prediction agreement with FP32 in percent. Computed in torch, where a quantizer rounds
like the runtime. At few bits also the effect of corrections; at 8 bits, the switches on networks of other families
(`trained_networks.py`), with the points of accuracy lost and the seconds of calibration.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from functools import cache
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

import rows
from images import MEAN, STD, TRAINED, Subject, cifar
from tersor.core.target import Target
from tersor.data import Batches
from tersor.graph.capture import capture
from tersor.methods.ptq import PTQ
from tersor.training.context import AttachContext
from trained_networks import subjects

RESULT = "ptq_defaults"
BATCH = 64
OPTIONS: tuple[dict[str, Any], ...] = (
    {"weight_range": "minmax", "activation_range": "minmax"},
    {"weight_range": "minmax", "activation_range": "mse"},
    {"weight_range": "minmax", "activation_range": "percentile", "percentile": 99.99},
    {"weight_range": "minmax", "activation_range": "percentile", "percentile": 99.999},
    {"weight_range": "minmax", "activation_range": "percentile", "percentile": 99.9},
    {"activation_range": "minmax", "weight_range": "mse"},
    {"activation_range": "mse", "weight_range": "mse"},
    {"weight_range": "minmax", "activation_range": "minmax", "calibration_images": 64},
    {"weight_range": "minmax", "activation_range": "minmax", "calibration_images": 256},
)
_MINMAX: dict[str, Any] = {"weight_range": "minmax", "activation_range": "minmax"}
SWITCHES: tuple[dict[str, Any], ...] = (
    _MINMAX,
    {**_MINMAX, "weight_range": "output_mse", "bias_correction": True},
    {**_MINMAX, "bias_correction": True},
    {**_MINMAX, "weight_range": "output_mse"},
    {**_MINMAX, "weight_range": "mse"},
    {**_MINMAX, "activation_range": "mse"},
    {**_MINMAX, "activation_range": "percentile", "percentile": 99.999},
    {**_MINMAX, "equalize": True},
    {**_MINMAX, "equalize": True, "bias_correction": True},
    {**_MINMAX, "variance_correction": True},
    {**_MINMAX, "per_channel": False},
)
"""At 8 bits, in the order of interest; the second is the default."""

FEW_BITS: tuple[dict[str, Any], ...] = tuple(
    {
        "bits": bits,
        "activation_bits": activation_bits,
        "weight_range": weights,
        "activation_range": values,
        **correction,
    }
    for bits, activation_bits in ((4, 8), (4, 4), (3, 8), (2, 8), (6, 8))
    for weights, values, corrections in (
        ("minmax", "minmax", ({}, {"variance_correction": True}, {"equalize": True, "variance_correction": True})),
        ("mse", "mse", ({}, {"variance_correction": True}, {"equalize": True, "variance_correction": True})),
        ("mse", "minmax", ({"variance_correction": True},)),
    )
    for correction in corrections
)


@cache
def held_out(count: int) -> tuple[Tensor, ...]:
    """Return batches of held-out training images (250, 3, 32, 32). The set is stratified, its order is not."""
    drawn = Batches(cifar().validation, 250, mean=MEAN, std=STD, shuffle=True, seed=0)
    return tuple(batch.images for batch, _ in zip(drawn, range(count // 250), strict=False))


@torch.inference_mode()
def logits(model: nn.Module, count: int) -> Tensor:
    """Return logits (count, 10)."""
    return torch.cat([model(images) for images in held_out(count)])


@cache
def labels(count: int) -> Tensor:
    """Return the classes of the held-out images (count,)."""
    drawn = Batches(cifar().validation, 250, mean=MEAN, std=STD, shuffle=True, seed=0)
    return torch.cat([batch.targets for batch, _ in zip(drawn, range(count // 250), strict=False)])


def correct(shown: Tensor) -> float:
    """Return the accuracy of logits (count, 10) on the held-out images in percent."""
    return 100 * float((shown.argmax(1) == labels(len(shown))).float().mean())


@cache
def reference(subject: Subject, count: int) -> Tensor:
    """Return the logits of FP32."""
    return logits(subject.network(), count)


@cache
def captured(subject: Subject) -> fx.GraphModule:
    """Return the captured network, from which every option starts."""
    return capture(subject.network(), held_out(250)[0])


def quantized(subject: Subject, runtime: Any, option: dict[str, Any], seed: int) -> tuple[nn.Module, float]:
    """Return the network calibrated with as many images as the option says, or the default; and the seconds."""
    images = Batches(cifar().train, BATCH, mean=MEAN, std=STD, shuffle=True, seed=seed)
    given: dict[str, Any] = {"bias_correction": False, **option}
    network = copy.deepcopy(captured(subject))
    attached = PTQ(**given).attach(network, AttachContext(data=images, target=Target(runtime=runtime)))
    start = time.perf_counter()
    attached.begin()
    return attached.model, time.perf_counter() - start


def report(subject: Subject, runtime: str, option: dict[str, Any], count: int, draws: int) -> None:
    """Write one row."""
    filled = {key: getattr(PTQ(**option), key) for key in ("weight_range", "activation_range", "calibration_images")}
    told = {key: option[key] for key in option if key not in filled}
    identity = {"model": subject.name, "runtime": runtime, **filled, **told, "held_out_images": count}
    seeds = range(draws)
    if rows.known(RESULT, identity | {"n": draws}, anywhere=True):
        return
    truth = reference(subject, count)
    errors: list[float] = []
    kept: list[float] = []
    lost: list[float] = []
    seconds: list[float] = []
    for seed in seeds:
        model, duration = quantized(subject, runtime, option, seed)
        shown = logits(model, count)
        seconds.append(duration)
        lost.append(correct(truth) - correct(shown))
        errors.append(float((shown - truth).square().mean() / truth.square().mean()))
        kept.append(100 * float((shown.argmax(1) == truth.argmax(1)).float().mean()))
    numbers = {
        "logit_error": statistics.mean(errors),
        "logit_errors": errors,
        "agreement": statistics.mean(kept),
        "agreements": kept,
        "lost": statistics.mean(lost),
        "calibration_seconds": statistics.median(seconds),
        "n": draws,
        "spread": rows.spread(errors),
    }
    rows.add(RESULT, identity, numbers, seeds)
    print(
        f"{json.dumps(identity)}: {numbers['logit_error']:.5f}, {numbers['agreement']:.2f} %, {numbers['lost']:+.2f}",
        flush=True,
    )


def show() -> None:
    """Print the rows, best first."""
    found = rows.read(RESULT)
    table = Table(
        "network", "placement", "bits", "activations", "weights", "and", "images", "error", "draws", "agreement"
    )
    for row in sorted(found, key=lambda row: (row["model"], row["runtime"], _bits(row), row["logit_error"])):
        activations = f"{row['activation_range']} {row.get('percentile', '')}"
        draws = " ".join(f"{error:.5f}" for error in row["logit_errors"])
        also = ", ".join(key for key in ("equalize", "variance_correction") if key in row)
        what = (row["model"], row["runtime"], _bits(row), activations, row["weight_range"], also)
        what = (*what, str(row["calibration_images"]))
        table.add_row(*what, f"{row['logit_error']:.5f}", draws, f"{row['agreement']:.2f}")
    Console(width=150).print(table)


def _bits(row: rows.Row) -> str:
    return f"W{row.get('bits', 8)}A{row.get('activation_bits', 8)}"


def main() -> None:
    """Measure what `bench/results/ptq_defaults.json` does not have yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    known = TRAINED | subjects()
    parser.add_argument("--models", nargs="+", default=list(known), choices=list(known))
    parser.add_argument("--only", choices=["eight bits", "few bits", "switches"], help="default: all")
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"], help="of the switches")
    parser.add_argument("--images", type=int, default=1000, help="images to evaluate, at most 5,000")
    parser.add_argument("--draws", type=int, default=3, help="draws of calibration images; seeds from 0")
    chosen = parser.parse_args()
    with rows.alone():
        for option in OPTIONS if chosen.only in (None, "eight bits") else ():
            for name in TRAINED.keys() & chosen.models:
                for runtime in ("onnxruntime", "openvino"):
                    report(TRAINED[name], runtime, option, chosen.images, chosen.draws)
        for option in FEW_BITS if chosen.only in (None, "few bits") else ():
            for name in TRAINED.keys() & chosen.models:
                report(TRAINED[name], "onnxruntime", option, chosen.images, chosen.draws)
        for option in SWITCHES if chosen.only in (None, "switches") else ():
            for name in [name for name in subjects() if name in chosen.models]:
                for runtime in chosen.runtimes:
                    report(known[name], runtime, option, chosen.images, chosen.draws)
    show()


if __name__ == "__main__":
    main()
