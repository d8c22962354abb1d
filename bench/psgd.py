"""PSGD: weights that a grid finds where they are. A trained ResNet-20 trains on by SGD, and by PSGD for a grid.

10 epochs on all training images, equal steps and schedule for every row. Afterwards the weights are rounded on the
fly, with one grid for a layer and its largest weight at the end, and nothing after: no calibration, no rounding that is
learned. Activations stay in float. `constant` is the control: gradients as much larger, whatever the position. The mean
scale is the best of three on the validation images at 4 bits, with one seed; the test set only reports.
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
from tersor.core.affine import Grid, to_integers
from tersor.core.ranges import weight_grid
from tersor.core.selection import weighted_layers
from tersor.data import Batches, Images
from tersor.measure import accuracy

RESULT = "psgd"
SEEDS, EPOCHS, RATE = (0, 1, 2), 10, 0.01
WIDTHS = (8, 6, 4, 3, 2)
SCALES = (1.0, 2.0, 4.0)
CHOSEN_AT = 4

Numbers = dict[str, Any]


@torch.no_grad()
def rounded(model: nn.Module, bits: int) -> nn.Module:
    """A copy whose weights lie on one grid for each layer; below 4 bits first and last have 8, as in the paper."""
    copied = copy.deepcopy(model)
    layers = weighted_layers(copied)
    ends = {next(iter(layers)), list(layers)[-1]}
    for name, layer in layers.items():
        grid = Grid.signed(8 if bits < 4 and name in ends else bits)
        scale, zero_point = weight_grid(layer.weight, grid, per_channel=False)
        layer.weight.copy_(to_integers(layer.weight, scale, zero_point, grid) * scale)
    return copied


@cache
def _batches(which: str) -> Batches:
    images: Images = getattr(cifar(), which)
    return Batches(images, 500, mean=MEAN, std=STD)


def trained(methods: list[Numbers], seed: int) -> tuple[nn.Module, Numbers]:
    """The network after the last epoch, and what its stage told."""
    stage = {"epochs": EPOCHS, "optimizer": {"learning_rate": RATE}, "methods": methods}
    walk, told = training.walked(training.recipe(stage, seed=seed), RESULT)
    return walk.model, told


def drawn(bits: int, scale: float, scale_by: str = "distance") -> list[Numbers]:
    """PSGD for a grid of so many bits, or its control."""
    return [{"psgd": {"bits": bits, "per_channel": False, "mean_scale": scale, "scale_by": scale_by}}]


def measured(model: nn.Module, told: Numbers) -> Numbers:
    """Accuracy in float and at every width; how many weights rounding makes zero, and how far it moves them."""
    layers = weighted_layers(model)
    total = sum(layer.weight.numel() for layer in layers.values())
    found: Numbers = {"float": accuracy(model, _batches("test")), "precision": told["precision"], "n": 1}
    for bits in WIDTHS:
        copied = rounded(model, bits)
        pairs = [(layers[name].weight, layer.weight) for name, layer in weighted_layers(copied).items()]
        found[f"{bits} bits"] = accuracy(copied, _batches("test"))
        found[f"zeros at {bits}"] = sum(int((shown == 0).sum()) for _, shown in pairs) / total
        found[f"error at {bits}"] = sum(float((was - shown).abs().sum()) for was, shown in pairs) / total
    return {**found, "spread": rows.spread([found["4 bits"]])}


def chosen_scale() -> float:
    """Of the mean scales the one whose network answers best on validation images at 4 bits."""
    reached: dict[float, float] = {}
    for scale in SCALES:
        identity = {"kind": "scale", "bits": CHOSEN_AT, "mean_scale": scale, "epochs": EPOCHS}
        if not rows.known(RESULT, identity, anywhere=True):
            model, _ = trained(drawn(CHOSEN_AT, scale), 0)
            found = accuracy(rounded(model, CHOSEN_AT), _batches("validation"))
            rows.add(RESULT, identity, {"validation_accuracy": found, "n": 1, "spread": rows.spread([found])}, [0])
            print(f"mean scale {scale:g}: {found:.2f} % validation at 4 bits", flush=True)
        reached |= {
            row["mean_scale"]: row["validation_accuracy"] for row in rows.read(RESULT) if row["kind"] == "scale"
        }
    return max(reached, key=lambda scale: reached[scale])


def contenders(scale: float) -> dict[str, tuple[list[Numbers], tuple[int, ...]]]:
    """Name -> methods, and seeds."""
    return {
        "sgd": ([], SEEDS),
        "psgd, 4 bits": (drawn(4, scale), SEEDS),
        "constant, 4 bits": (drawn(4, scale, "constant"), SEEDS),
        **{f"psgd, {bits} bits": (drawn(bits, scale), SEEDS[:1]) for bits in WIDTHS if bits != CHOSEN_AT},
    }


def show() -> None:
    """Prints the rows: the mean over the seeds."""
    table = Table("trained by", "float", *(f"{bits} bits" for bits in WIDTHS), "zeros at 4", "seeds", title="ResNet-20")
    found = [row for row in rows.read(RESULT) if row["kind"] == "accuracy"]
    for name in dict.fromkeys(row["contender"] for row in found):
        mine = [row for row in found if row["contender"] == name]
        means = [statistics.mean(row[key] for row in mine) for key in ("float", *(f"{bits} bits" for bits in WIDTHS))]
        zeros = 100 * statistics.mean(row["zeros at 4"] for row in mine)
        table.add_row(name, *(f"{mean:.2f}" for mean in means), f"{zeros:.1f} %", str(len(mine)))
    Console(width=120).print(table)


def main() -> None:
    """Trains what is not in `bench/results/psgd.json` yet, and prints all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="train nothing, print what is there")
    if not parser.parse_args().table:
        with rows.alone():
            scale = chosen_scale()
            for name, (methods, seeds) in contenders(scale).items():
                for seed in seeds:
                    identity = {"kind": "accuracy", "contender": name, "seed": seed, "epochs": EPOCHS}
                    if not rows.known(RESULT, identity, anywhere=True):
                        found = measured(*trained(methods, seed))
                        rows.add(RESULT, identity, {**found, "mean_scale": scale}, [seed])
                        print(f"{name}, seed {seed}: {found['float']:.2f}, at 4 bits {found['4 bits']:.2f}", flush=True)
    show()


if __name__ == "__main__":
    main()
