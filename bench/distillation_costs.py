"""Measure the cost of distillation: time of a step over a reference: student step plus teacher forward pass.

A ResNet-20 learns from a ResNet-56 by each method in turn, with its defaults, on batches of 128 augmented images.
Student and teacher alone are written by hand, in the precision that the loop chooses on this machine. A method's
teacher is fused, as in a stage. In every round each contender runs once, in a new order. A ratio compares times of one
round, and the median of all rounds counts. The reference is also compared with a second copy of itself.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

import rows
from images import MEAN, STD, TRAINED, cifar
from tersor import methods as registry
from tersor.core.device import keep_freed_memory, precision_for, set_layout
from tersor.data import Batches
from tersor.data.batch import Batch
from tersor.graph.fused_inference import fused
from tersor.models import build
from tersor.training.context import AttachContext
from tersor.training.objective import Objective

RESULT = "distillation_costs"
BATCH, ROUNDS, WARM_ROUNDS = 128, 20, 2
LIMITS = {"logits": 1.10, "layers": 1.25}
BARE, AGAIN = "bare", "bare, again"
TEACHER, FUSED = "teacher", "teacher, in fewer passes"
PRECISION = precision_for(torch.device("cpu"), "auto")

Step = Callable[[Batch], None]


def student() -> nn.Module:
    """Return a ResNet-20 from scratch."""
    torch.manual_seed(0)
    return build("resnet20", 10)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer over everything trainable in it."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.SGD(learning, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def bare() -> Step:
    """Return the student's step on the labels followed by the teacher's forward pass."""
    network, teacher = student().train(), TRAINED["resnet56"].network()
    for each in (network, teacher):
        set_layout(each, torch.channels_last)
    optimizer = sgd(network)

    def step(batch: Batch) -> None:
        with torch.autocast("cpu", PRECISION, enabled=PRECISION is not None):
            with torch.inference_mode():
                teacher(batch.images)
            loss = F.cross_entropy(network(batch.images), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def taught(name: str) -> tuple[Step, str]:
    """Return one step of a method with its defaults, and whether it uses logits or layers."""
    network, teacher = student(), TRAINED["resnet56"].network()
    calm = Batches(cifar().train, 64, mean=MEAN, std=STD)
    cls: Any = registry.get(name)
    # `begin` is skipped: a frozen part need not be trained to be timed
    attached = cls().attach(network, AttachContext(data=calm, teacher=teacher, steps=1000))
    layers = attached.layers
    few = next(iter(calm)).images[:8].contiguous()
    objective = Objective(
        attached.model,
        attached.terms,
        fused(teacher, few, [path for _, path in layers], PRECISION),
        label_weight=attached.label_weight,
        layers=layers,
        autocast=PRECISION,
    )
    set_layout(objective.train(), torch.channels_last)
    optimizer = sgd(objective)
    attached.bind(optimizer)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        torch.stack([*objective(batch).values()]).sum().backward()
        optimizer.step()

    return step, "layers" if layers else "logits"


def answering(fewer_passes: bool) -> Step:
    """Return the teacher's forward pass alone."""
    teacher = TRAINED["resnet56"].network()
    if fewer_passes:
        few = next(iter(Batches(cifar().train, 8, mean=MEAN, std=STD))).images.contiguous()
        teacher = fused(teacher, few, precision=PRECISION)
    set_layout(teacher, torch.channels_last)

    def step(batch: Batch) -> None:
        with torch.inference_mode(), torch.autocast("cpu", PRECISION, enabled=PRECISION is not None):
            teacher(batch.images)

    return step


def batches() -> Iterator[Batch]:
    """Yield augmented images endlessly."""
    epoch = 0
    source = Batches(cifar().train, BATCH, mean=MEAN, std=STD, shuffle=True, seed=0, augment="crop_flip")
    while True:
        source.set_epoch(epoch)
        for batch in source:
            yield Batch(batch.images.contiguous(memory_format=torch.channels_last), batch.targets, batch.index)
        epoch += 1


def measure(names: list[str]) -> None:
    """Write a row for each method."""
    keep_freed_memory()
    taught_by = {name: taught(name) for name in names}
    steps = {BARE: bare(), AGAIN: bare(), **{name: step for name, (step, _) in taught_by.items()}}
    steps |= {TEACHER: answering(fewer_passes=False), FUSED: answering(fewer_passes=True)}
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
    for name in (AGAIN, FUSED, *names):
        over = TEACHER if name == FUSED else BARE
        ratios = [own / other for own, other in zip(counted[name], counted[over], strict=True)]
        kind = taught_by[name][1] if name in taught_by else ""
        identity = {**_identity(name), "looks_at": kind, "over": over}
        numbers = {"ratio": statistics.median(ratios), "seconds": statistics.median(counted[name]), "n": ROUNDS}
        rows.add(RESULT, identity, {**numbers, "spread": rows.spread(ratios)}, [0])


def _identity(name: str) -> dict[str, Any]:
    precision = "bfloat16" if PRECISION else "float32"
    return {"method": name, "student": "resnet20", "teacher": "resnet56", "batch": BATCH, "precision": precision}


def show() -> None:
    """Print the rows of this machine and their limits."""
    table = Table("method", "uses", "seconds per step", "over the reference", "p10 to p90", "limit")
    for row in rows.read(RESULT):
        if row["machine"] == rows.machine():
            spread = f"{row['spread']['p10']:.3f} to {row['spread']['p90']:.3f}"
            limit = f"{LIMITS[row['looks_at']]:.2f}" if row["looks_at"] in LIMITS else ""
            told = f"{row['seconds']:.3f}", f"{row['ratio']:.3f}", spread, limit
            table.add_row(row["method"], row["looks_at"], *told)
    Console(width=110).print(table)


def main() -> None:
    """Measure all methods that need a teacher in one run, if rows are missing, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure existing rows again")
    parser.add_argument("--table", action="store_true", help="only print existing rows")
    chosen = parser.parse_args()
    if not chosen.table:
        torch.set_num_threads(2)
        names = [name for name in registry.names() if getattr(registry.get(name), "needs_teacher", False)]
        with rows.alone():
            if chosen.again or not all(rows.known(RESULT, _identity(name)) for name in (AGAIN, FUSED, *names)):
                measure(names)
    show()


if __name__ == "__main__":
    main()
