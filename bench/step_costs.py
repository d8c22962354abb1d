"""Measure the cost of a method's step over plain SGD in the same precision.

A ResNet-20 trains on batches of 128 augmented images. In every round each contender runs once, in a new order; a ratio
compares times of one round, and the median of all rounds counts. Plain SGD is written by hand and runs twice, which
gives the noise floor. torchao's quantization-aware training (PT2E, its x86 quantizer) runs beside `qat` and `lsq`. The
peak memory is that of a separate process in which a contender trains for a few steps.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

import peers
import rows
from images import MEAN, STD, TRAINED, cifar
from tersor import methods as registry
from tersor.core.device import keep_freed_memory, precision_for, set_layout
from tersor.data import Batches
from tersor.data.batch import Batch
from tersor.training.context import AttachContext
from tersor.training.objective import Objective

RESULT = "step_costs"
BATCH, ROUNDS, WARM_ROUNDS, STEPS = 128, 32, 3, 1000
BARE, AGAIN, PEER = "bare", "bare, again", "torchao qat"
LIMITS = {"psgd": 1.05, "qat": 2.6, "lsq": 3.5}
PRECISION = precision_for(torch.device("cpu"), "auto")

Step = Callable[[Batch], None]


def network() -> nn.Module:
    """Return a trained ResNet-20."""
    return TRAINED["resnet20"].network()


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer over everything trainable in it."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.SGD(learning, lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)


def by_hand(model: nn.Module) -> Step:
    """Return the step of a loop written without a toolkit."""
    set_layout(model, torch.channels_last)
    optimizer = sgd(model)

    def step(batch: Batch) -> None:
        with torch.autocast("cpu", PRECISION, enabled=PRECISION is not None):
            loss = F.cross_entropy(model(batch.images), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def by_tersor(name: str) -> Step:
    """Return a step of a method with its defaults."""
    images = Batches(cifar().train, 64, mean=MEAN, std=STD, shuffle=True, seed=0)
    cls: Any = registry.get(name)
    attached = cls().attach(network(), AttachContext(data=images, steps=STEPS))
    attached.begin()
    objective = Objective(attached.model, attached.terms, label_weight=attached.label_weight, autocast=PRECISION)
    set_layout(objective.train(), torch.channels_last)
    optimizer = sgd(objective)
    attached.bind(optimizer)

    def step(batch: Batch) -> None:
        torch.stack([*objective(batch).values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def made(name: str) -> Step:
    """Return a step of any contender."""
    if name in (BARE, AGAIN):
        return by_hand(network().train())
    if name == PEER:
        return by_hand(peers.torchao_training(network().train(), next(batches()).images))
    return by_tersor(name)


def batches() -> Iterator[Batch]:
    """Yield augmented images endlessly."""
    source = Batches(cifar().train, BATCH, mean=MEAN, std=STD, shuffle=True, seed=0, augment="crop_flip")
    for epoch in itertools.count():
        source.set_epoch(epoch)
        for batch in source:
            if len(batch.images) == BATCH:
                yield Batch(batch.images.contiguous(memory_format=torch.channels_last), batch.targets, batch.index)


def measure(names: list[str]) -> None:
    """Write a row for each contender."""
    keep_freed_memory()
    steps = {name: made(name) for name in (BARE, AGAIN, *names)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    draw, given = torch.Generator().manual_seed(0), batches()
    for _ in range(WARM_ROUNDS + ROUNDS):
        batch = next(given)
        for place in torch.randperm(len(steps), generator=draw).tolist():
            name = list(steps)[place]
            begun = time.perf_counter()
            steps[name](batch)
            seconds[name].append(time.perf_counter() - begun)
    counted = {name: times[WARM_ROUNDS:] for name, times in seconds.items()}
    for name in (AGAIN, *names):
        ratios = [own / other for own, other in zip(counted[name], counted[BARE], strict=True)]
        numbers = {
            "ratio": statistics.median(ratios),
            # a method that works every few steps contributes to the mean
            "ratio_of_sums": sum(counted[name]) / sum(counted[BARE]),
            "seconds": statistics.median(counted[name]),
            "megabytes": peak(name),
            "n": ROUNDS,
            "spread": rows.spread(ratios),
        }
        rows.add(RESULT, _identity(name), numbers, [0])


def _identity(name: str) -> dict[str, Any]:
    precision = "bfloat16" if PRECISION else "float32"
    return {"method": name, "model": "resnet20", "batch": BATCH, "precision": precision}


def peak(name: str) -> float:
    """Return the megabytes of a process in which a contender trained for a few steps, data and libraries included."""
    command = [sys.executable, __file__, "--peak", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _print_peak(name: str) -> None:
    step = made(name)
    for batch, _ in zip(batches(), range(5), strict=False):
        step(batch)
    # getrusage would report the parent's peak, which a child inherits
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(line.split()[1]) / 1024)


def show() -> None:
    """Print the rows of this machine and their limits."""
    table = Table("method", "seconds per step", "over plain SGD", "p10 to p90", "of all steps", "MB", "limit")
    for row in rows.read(RESULT):
        if row["machine"] == rows.machine():
            spread = f"{row['spread']['p10']:.3f} to {row['spread']['p90']:.3f}"
            told = f"{row['seconds']:.3f}", f"{row['ratio']:.3f}", spread, f"{row['ratio_of_sums']:.3f}"
            limit = LIMITS.get(row["method"])
            table.add_row(row["method"], *told, f"{row['megabytes']:.0f}", f"{limit:.2f}" if limit else "")
    Console(width=120).print(table)


def main() -> None:
    """Measure all contenders in one run, if rows are missing, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure existing rows again")
    parser.add_argument("--table", action="store_true", help="only print existing rows")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(2)
    if chosen.peak:
        _print_peak(chosen.peak)
        return
    names = [*LIMITS, PEER]
    if not chosen.table:
        with rows.alone():
            if chosen.again or not all(rows.known(RESULT, _identity(name)) for name in names):
                measure(names)
    show()


if __name__ == "__main__":
    main()
