"""Measure the accuracy of a trained ResNet-20 when most of its weights are masked.

    accuracy   10 epochs on 20,000 training images, the same steps and schedule for every row: one-shot, iterative, dpf,
               dcil complete and with each of its parts disabled, rigl; and the dense network, trained as long

The masks cover the convolutions, with a global threshold except for rigl. The learning rate drops at one half and at
three quarters of the steps, and rising sparsities end by the second drop. Accuracy is on the test set after the last
epoch, never the best epoch. The curve is on the validation images after every epoch, with the mask applied; its last
three values show the fluctuation. A row counts only at its final sparsity: zeros are counted, and a wrong number is an
error. Additional rows with one seed look for the reason why dpf is not ahead of iterative pruning: the final sparsity
at half of the steps, a fifth of the learning rate, and 40 epochs. An interrupted row continues from its last
checkpoint.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

import rows
import training
from images import cifar
from tersor.graph.layer_selection import prunable

RESULT = "pruning"
IMAGES, EPOCHS, RATE, WEIGHT_DECAY = 20_000, 10, 0.05, 1e-4
SEEDS = (0, 1, 2)
SPARSITY, OTHERS = 0.95, (0.8, 0.9, 0.98)
LAST = 3
"""The last epochs whose mean and spread are reported."""

Method = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Contender:
    """A way to train.

    Attributes:
        name: its name in the rows.
        methods: without the sparsity, which is passed to each; a random mask is drawn with the row's seed.
        others: whether it also has a row at each of the other sparsities, with one seed.
        epochs: epochs of training.
        rate: the highest learning rate.
    """

    name: str
    methods: tuple[Method, ...]
    others: bool = False
    epochs: int = EPOCHS
    rate: float = RATE

    def stage(self, sparsity: float, seed: int) -> dict[str, Any]:
        """Return its stage."""
        drawn = {"importance": "random", "seed": seed}
        return {
            "epochs": self.epochs,
            "validate_every": 1,
            "optimizer": {"learning_rate": self.rate, "weight_decay": WEIGHT_DECAY},
            "lr_schedule": {"name": "step", "milestones": [0.5, 0.75]},
            "methods": [
                {name: {"sparsity": sparsity, **given, **(drawn if "importance" in given else {})}}
                for method in self.methods
                for name, given in method.items()
            ],
        }


GLOBAL = {"scope": "global"}
CUBIC = {**GLOBAL, "sparsity_schedule": "cubic"}
SWITCHES_OF_DCIL: dict[str, dict[str, Any]] = {
    "gradient not refined": {"refined_gradient": False},
    "one BatchNorm and head": {"own_norms": False},
    "no mutual distillation": {"mutual": False},
}
CONTENDERS = (
    Contender("dense", ()),
    Contender("one-shot, magnitude", ({"weight_pruning": GLOBAL},)),
    Contender("one-shot, random", ({"weight_pruning": {**GLOBAL, "importance": "random"}},)),
    Contender("iterative", ({"weight_pruning": CUBIC},), others=True),
    Contender("dpf", ({"dpf": {}},), others=True),
    Contender("dcil", ({"dcil": {}},), others=True),
    *(Contender(f"dcil, {name}", ({"dcil": off},)) for name, off in SWITCHES_OF_DCIL.items()),
    Contender("rigl", ({"rigl": {}},)),
)
SEARCH = (
    Contender("iterative, risen by half", ({"weight_pruning": {**CUBIC, "end": 0.5}},)),
    Contender("dpf, risen by half", ({"dpf": {"end": 0.5}},)),
    Contender("iterative, a fifth of the rate", ({"weight_pruning": CUBIC},), rate=RATE / 5),
    Contender("dpf, a fifth of the rate", ({"dpf": {}},), rate=RATE / 5),
    Contender("iterative, 40 epochs", ({"weight_pruning": CUBIC},), epochs=40),
    Contender("dpf, 40 epochs", ({"dpf": {}},), epochs=40),
)
"""One seed each, at the one sparsity."""


def zeros(model: nn.Module) -> tuple[int, int]:
    """Return how many computed convolution weights are zero in eval mode, and how many there are."""
    weights = [layer.weight for layer in prunable(model.eval()).values()]
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)


def measure(contender: Contender, sparsity: float, seed: int) -> None:
    """Write the row of one contender, sparsity and seed, if it is missing."""
    identity = {"kind": "accuracy", "contender": contender.name, "sparsity": sparsity, "seed": seed}
    identity |= {"epochs": contender.epochs, "images": IMAGES}
    if rows.known(RESULT, identity, anywhere=True):
        return
    given = training.recipe(contender.stage(sparsity, seed), seed=seed)
    experiment, told = training.walked(given, RESULT, cifar(IMAGES))
    found, weights = zeros(experiment.model)
    # a rule per layer rounds in every layer
    rounded = len(prunable(experiment.model)) / 2 if contender.methods else 0
    assert abs(found - sparsity * weights) <= rounded + 0.5, f"{found} of {weights} weights are zero, not {sparsity}"
    last = told["validation_by_epoch"][-LAST:]
    reached = training.accuracy_on_test(experiment)
    numbers = {
        "accuracy": reached,
        "zeros": found,
        "weights": weights,
        "curve": told["validation_by_epoch"],
        "last_mean": statistics.mean(last),
        "last_deviation": statistics.stdev(last),
        "masks": told.get("masks"),
        "steps": told["steps"],
        "minutes": told["minutes"],
        "precision": told["precision"],
        "n": 1,
    }
    rows.add(RESULT, identity, {**numbers, "spread": rows.spread([reached])}, [seed])
    print(f"{contender.name}, {sparsity:g}, seed {seed}: {reached:.2f} %, {told['minutes']:.1f} minutes", flush=True)


def wanted(seeds: list[int], only: list[str] | None) -> Iterator[tuple[Contender, float, int]]:
    """Yield contender, sparsity and seed of every row, seed by seed; contenders with one seed come last."""
    chosen = [contender for contender in CONTENDERS if not only or contender.name in only]
    for seed in seeds:
        yield from ((contender, SPARSITY if contender.methods else 0.0, seed) for contender in chosen)
    for sparsity in OTHERS:
        yield from ((contender, sparsity, seeds[0]) for contender in chosen if contender.others)
    yield from ((contender, SPARSITY, seeds[0]) for contender in SEARCH if not only or contender.name in only)


def show() -> None:
    """Print the rows: mean and range over the seeds."""
    found = [row for row in rows.read(RESULT) if row["kind"] == "accuracy"]
    table = Table(
        *(
            "contender",
            "sparsity",
            "accuracy",
            "least to most",
            "seeds",
            f"validation, last {LAST}",
            "swing",
            "minutes",
        ),
        title=f"ResNet-20, {EPOCHS} epochs of {IMAGES:,} images, or what the name says",
    )
    for name, sparsity in dict.fromkeys((row["contender"], row["sparsity"]) for row in found):
        mine = [row for row in found if (row["contender"], row["sparsity"]) == (name, sparsity)]
        reached = [row["accuracy"] for row in mine]
        means = {key: statistics.mean(row[key] for row in mine) for key in ("last_mean", "last_deviation", "minutes")}
        table.add_row(
            *(name, f"{100 * sparsity:g} %", f"{statistics.mean(reached):.2f}"),
            *(f"{min(reached):.2f} to {max(reached):.2f}", str(len(mine)), f"{means['last_mean']:.2f}"),
            *(f"{means['last_deviation']:.2f}", f"{means['minutes']:.1f}"),
        )
    Console(width=140).print(table)


def main() -> None:
    """Train what `bench/results/pruning.json` does not have yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=[each.name for each in (*CONTENDERS, *SEARCH)], help="default: all"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--table", action="store_true", help="only print existing rows")
    chosen = parser.parse_args()
    if not chosen.table:
        with rows.alone():
            for contender, sparsity, seed in wanted(chosen.seeds, chosen.only):
                measure(contender, sparsity, seed)
    show()


if __name__ == "__main__":
    main()
