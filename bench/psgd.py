"""Train a trained ResNet-20 further with SGD and with PSGD for a grid, then round its weights.

5 epochs on all training images, equal steps and schedule for every row. Afterwards the weights are rounded directly,
with one grid per layer whose end is the largest weight, and without correction: no calibration, no learned rounding.
Activations stay in float. `constant` is the control: gradients scaled as much on average, independently of the
position. The mean scale is the best of three on the validation images at 4 bits, with one seed; the test set is used
for reporting only.

In addition: `adaround` on the networks trained with SGD and PSGD, with one grid per layer and 8-bit activations; and
PSGD towards zero, whose weights are then masked by nine tenths at once, with one threshold and without fine-tuning.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from functools import cache
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import rows
import training
from images import MEAN, STD, cifar
from tersor.core.target import Target
from tersor.data import Batches, Images
from tersor.evaluation.scoring import network_score
from tersor.graph.layer_selection import weighted_layers
from tersor.methods.adaround import AdaRound
from tersor.methods.weight_pruning import WeightPruning
from tersor.quantization.grid import Grid, to_integers
from tersor.quantization.observers import weight_grid
from tersor.training.context import AttachContext
from tersor.training.method import Method

RESULT = "psgd"
SEEDS, EPOCHS, RATE = (0, 1, 2), 5, 0.01
WIDTHS = (8, 6, 4, 3, 2)
SCALES = (1.0, 2.0, 4.0)
CHOSEN_AT = 4

Numbers = dict[str, Any]


@torch.no_grad()
def rounded(model: nn.Module, bits: int) -> nn.Module:
    """Return a copy with one grid per layer; below 4 bits the first and last layer have 8, as in the paper."""
    copied = copy.deepcopy(model)
    layers = weighted_layers(copied)
    ends = {next(iter(layers)), list(layers)[-1]}
    for name, layer in layers.items():
        grid = Grid.signed(8 if bits < 4 and name in ends else bits)
        scale, zero_point = weight_grid(layer.weight, grid, per_channel=False)
        layer.weight.copy_(to_integers(layer.weight, scale, zero_point, grid) * scale)
    return copied


def laid(model: nn.Module, method: Method) -> nn.Module:
    """Return a copy with a method that needs no training."""
    images = Batches(cifar().train, 64, mean=MEAN, std=STD, shuffle=True, seed=0)
    attached = method.attach(copy.deepcopy(model), AttachContext(data=images, target=Target(cpu="vnni")))
    attached.begin()
    return attached.model


AFTERWARDS: dict[str, Method] = {
    "adaround at 4": AdaRound(bits=4, per_channel=False),
    "adaround at 3": AdaRound(bits=3, per_channel=False),
    "90 % pruned": WeightPruning(sparsity=0.9, scope="global"),
}
LAID = {"sgd": [*AFTERWARDS], "psgd, 4 bits": ["adaround at 4", "adaround at 3"], "psgd, zero": ["90 % pruned"]}
"""The methods that are attached after training, by contender; first seed only."""


@cache
def _batches(which: str) -> Batches:
    images: Images = getattr(cifar(), which)
    return Batches(images, 500, mean=MEAN, std=STD)


def trained(methods: list[Numbers], seed: int) -> tuple[nn.Module, Numbers]:
    """Return the network after the last epoch, and the metrics of its stage."""
    stage = {"epochs": EPOCHS, "optimizer": {"learning_rate": RATE}, "methods": methods}
    experiment, told = training.walked(training.recipe(stage, seed=seed), RESULT)
    return experiment.model, told


def drawn(bits: int, scale: float, **other: str) -> list[Numbers]:
    """Return PSGD for a grid of so many bits, its control, or PSGD towards zero."""
    return [{"psgd": {"bits": bits, "per_channel": False, "mean_scale": scale, **other}}]


@torch.no_grad()
def measured(model: nn.Module, told: Numbers) -> Numbers:
    """Return the accuracy in float and at every width, the fraction rounded to zero, and the mean rounding distance."""
    layers = weighted_layers(model)
    total = sum(layer.weight.numel() for layer in layers.values())
    found: Numbers = {"float": network_score(model, _batches("test")), "precision": told["precision"], "n": 1}
    for bits in WIDTHS:
        copied = rounded(model, bits)
        pairs = [(layers[name].weight, layer.weight) for name, layer in weighted_layers(copied).items()]
        found[f"{bits} bits"] = network_score(copied, _batches("test"))
        found[f"zeros at {bits}"] = sum(int((shown == 0).sum()) for _, shown in pairs) / total
        found[f"error at {bits}"] = sum(float((was - shown).abs().sum()) for was, shown in pairs) / total
    return {**found, "spread": rows.spread([found["4 bits"]])}


def laid_afterwards(name: str, model: nn.Module, seed: int) -> Numbers:
    """Return the accuracy after each method that is attached to this contender's weights."""
    wanted = LAID.get(name, []) if seed == SEEDS[0] else []
    return {each: network_score(laid(model, AFTERWARDS[each]), _batches("test")) for each in wanted}


def chosen_scale() -> float:
    """Return the mean scale whose network is best on the validation images at 4 bits."""
    reached: dict[float, float] = {}
    for scale in SCALES:
        identity = {"kind": "scale", "bits": CHOSEN_AT, "mean_scale": scale, "epochs": EPOCHS}
        if not rows.known(RESULT, identity, anywhere=True):
            model, _ = trained(drawn(CHOSEN_AT, scale), 0)
            found = network_score(rounded(model, CHOSEN_AT), _batches("validation"))
            in_float = network_score(model, _batches("validation"))
            numbers = {"validation_accuracy": found, "validation_in_float": in_float, "spread": rows.spread([found])}
            rows.add(RESULT, identity, {**numbers, "n": 1}, [0])
            print(f"mean scale {scale:g}: {found:.2f} % validation at 4 bits, {in_float:.2f} in float", flush=True)
        reached |= {
            row["mean_scale"]: row["validation_accuracy"] for row in rows.read(RESULT) if row["kind"] == "scale"
        }
    return max(reached, key=lambda scale: reached[scale])


def contenders(scale: float) -> dict[str, tuple[list[Numbers], tuple[int, ...]]]:
    """Return methods and seeds by name."""
    return {
        "sgd": ([], SEEDS),
        "psgd, 4 bits": (drawn(4, scale), SEEDS),
        "constant, 4 bits": (drawn(4, scale, scale_by="constant"), SEEDS),
        "psgd, zero": (drawn(4, scale, target="zero"), SEEDS[:1]),
        **{f"psgd, {bits} bits": (drawn(bits, scale), SEEDS[:1]) for bits in WIDTHS if bits != CHOSEN_AT},
    }


def show() -> None:
    """Print the rows: the mean over the seeds."""
    table = Table("trained by", "float", *(f"{bits} bits" for bits in WIDTHS), "zeros at 4", "seeds", title="ResNet-20")
    found = [row for row in rows.read(RESULT) if row["kind"] == "accuracy"]
    for name in dict.fromkeys(row["contender"] for row in found):
        mine = [row for row in found if row["contender"] == name]
        means = [statistics.mean(row[key] for row in mine) for key in ("float", *(f"{bits} bits" for bits in WIDTHS))]
        zeros = 100 * statistics.mean(row["zeros at 4"] for row in mine)
        table.add_row(name, *(f"{mean:.2f}" for mean in means), f"{zeros:.1f} %", str(len(mine)))
    Console(width=120).print(table)
    table = Table("trained by", *AFTERWARDS, title="and then")
    for row in found:
        if row["contender"] in LAID and row["seed"] == SEEDS[0]:
            table.add_row(row["contender"], *(f"{row[name]:.2f}" if name in row else "" for name in AFTERWARDS))
    Console(width=120).print(table)


def main() -> None:
    """Train what `bench/results/psgd.json` does not have yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only print existing rows")
    if not parser.parse_args().table:
        with rows.alone():
            scale = chosen_scale()
            for name, (methods, seeds) in contenders(scale).items():
                for seed in seeds:
                    identity = {"kind": "accuracy", "contender": name, "seed": seed, "epochs": EPOCHS}
                    if not rows.known(RESULT, identity, anywhere=True):
                        model, told = trained(methods, seed)
                        found = measured(model, told) | laid_afterwards(name, model, seed)
                        rows.add(RESULT, identity, {**found, "mean_scale": scale}, [seed])
                        print(f"{name}, seed {seed}: {found['float']:.2f}, at 4 bits {found['4 bits']:.2f}", flush=True)
    show()


if __name__ == "__main__":
    main()
