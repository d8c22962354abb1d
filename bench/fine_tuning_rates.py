"""Choose the default learning rate of a stage that starts from trained weights, on validation images.

A trained network is fine-tuned for 20 and for 200 steps with four methods at each learning rate; the table shows how
far its accuracy falls. The shared networks were trained on all training images, so half of the test images choose and
the other half reports, in the rows of the default only.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from rich.console import Console
from rich.table import Table

import rows
import training
from images import TRAINED, cifar
from tersor.core.progress import NullProgress
from tersor.data import Splits
from tersor.data.image_sets import View
from tersor.data.stratified import generator, stratified
from tersor.evaluation.costs import accuracy
from tersor.pipeline.experiment import EVALUATION_BATCH
from tersor.pipeline.setup import prepare

RESULT = "fine_tuning_rates"
RATES = (0.03, 0.01, 0.003, 0.001)
STEPS = (20, 200)
METHODS: dict[str, tuple[dict[str, Any], str | None]] = {
    "qat": ({"qat": {}}, None),
    "lsq": ({"lsq": {}}, None),
    "weight_pruning": ({"weight_pruning": {"sparsity": 0.5}}, None),
    "soft_targets": ({"soft_targets": {}}, "original"),
}
SEED = 0


@cache
def images() -> Splits:
    """Return all training images, and the test images in two halves of 5,000, for validation and for testing."""
    everything = cifar()
    half, rest = stratified(everything.test.labels, len(everything.test) // 2, generator(SEED))
    return replace(everything, validation=View(everything.test, half), test=View(everything.test, rest))


@cache
def before(network: str) -> float:
    """Return the validation accuracy of the trained network in percent."""
    given = training.recipe({"steps": 1, "methods": []}, network=network)
    experiment = prepare(given, model=None, data=images(), progress=NullProgress())
    return accuracy(experiment.model, experiment.batches(experiment.data.validation, EVALUATION_BATCH))


def report(network: str, method: str, steps: int, rate: float | None) -> None:
    """Write one row; without a rate, that of the default, with the test accuracy."""
    identity = {"model": network, "method": method, "steps": steps, "learning_rate": rate}
    if rows.known(RESULT, identity, anywhere=True):
        return
    entry, teacher = METHODS[method]
    stage: dict[str, Any] = {"steps": steps, "methods": [entry]}
    if rate is not None:
        stage["optimizer"] = {"learning_rate": rate}
    given = training.recipe(stage, network=network, teacher=teacher, seed=SEED)
    experiment, record = training.walked(given, RESULT, images())
    after = record["validation_accuracy"]
    numbers = {"before": before(network), "after": after, "drop": before(network) - after}
    if rate is None:
        numbers["test_after"] = training.accuracy_on_test(experiment)
    rows.add(RESULT, identity, {**numbers, "n": 1, "spread": rows.spread([numbers["drop"]])}, [SEED])
    print(f"{json.dumps(identity)}: {numbers['drop']:+.2f}", flush=True)


def cases(models: list[str]) -> Iterator[tuple[str, str, int]]:
    """Yield network, method and steps."""
    for network in models:
        for method in METHODS:
            for steps in STEPS:
                yield network, method, steps


def show() -> None:
    """Print the lost accuracy by learning rate."""
    found = rows.read(RESULT)
    table = Table("network", "method", "steps", *map(str, RATES), "default", "test accuracy with it")
    for network, method, steps in cases(list(dict.fromkeys(row["model"] for row in found))):
        mine = {row["learning_rate"]: row for row in found if _case(row) == (network, method, steps)}
        drops = [f"{mine[rate]['drop']:.2f}" if rate in mine else "" for rate in (*RATES, None)]
        table.add_row(network, method, str(steps), *drops, f"{mine[None]['test_after']:.2f}" if None in mine else "")
    Console(width=130).print(table)
    for rate in RATES:
        drops = [row["drop"] for row in found if row["learning_rate"] == rate]
        if drops:
            print(f"{rate}: mean {statistics.mean(drops):.2f}, worst {max(drops):.2f} points over {len(drops)} rows")


def _case(row: rows.Row) -> tuple[str, str, int]:
    return row["model"], row["method"], row["steps"]


def main() -> None:
    """Measure what `bench/results/fine_tuning_rates.json` does not have yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(TRAINED), choices=list(TRAINED))
    parser.add_argument("--default", action="store_true", help="measure the default instead of the four rates")
    chosen = parser.parse_args()
    with rows.alone():
        for network, method, steps in cases(chosen.models):
            for rate in (None,) if chosen.default else RATES:
                report(network, method, steps, rate)
    show()


if __name__ == "__main__":
    main()
