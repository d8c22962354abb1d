"""Measure the cost of dynamic masks: seconds of a step over plain SGD's, and the memory of a global threshold.

A trained ResNet-20 is pruned to 95 % by each method in turn, on batches of 128 augmented images. Plain SGD is written
by hand, without an Objective and without masks; both run in the precision that the loop chooses here. In every round
each contender runs once, in a new order. A round has 16 steps, the interval between two masks, so every round contains
one. A ratio compares times of one round, and the median of all rounds counts. Plain SGD is also compared with a second
copy of itself.

The memory is the peak beyond the weights while the masks of a ResNet-56 are computed. Planning means capture, groups
and removal of half of all channels of a DenseNet-121 at 64 and at 224 pixels; torch-pruning's MagnitudePruner does the
same, in turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning
import torchvision
from rich.console import Console
from rich.table import Table
from torch import nn

import rows
from images import MEAN, STD, TRAINED, cifar
from tersor.core.device import keep_freed_memory, precision_for, set_layout
from tersor.data import Batches
from tersor.data.batch import Batch
from tersor.graph.capture import capture
from tersor.graph.layer_selection import prunable
from tersor.methods.dcil import DCIL
from tersor.methods.dpf import DPF
from tersor.methods.rigl import RigL
from tersor.methods.weight_pruning import WeightPruning
from tersor.pruning.channel_groups import coupled_channels, merge_cuts, remove
from tersor.pruning.topk import masks
from tersor.training.context import AttachContext
from tersor.training.objective import Objective

RESULT = "pruning_costs"
BATCH, EVERY, ROUNDS, WARM_ROUNDS = 128, 16, 12, 1
SPARSITY, STEPS = 0.95, 100_000
"""Final sparsity, and steps of the stage: so many that all timed steps are within the ramp. Timing starts at half of
the final sparsity."""
METHODS: dict[str, Any] = {
    "weight_pruning": WeightPruning(sparsity=SPARSITY, scope="global", sparsity_schedule="cubic", every=EVERY),
    "dpf": DPF(sparsity=SPARSITY, every=EVERY),
    "rigl": RigL(sparsity=SPARSITY, every=EVERY),
    "dcil": DCIL(sparsity=SPARSITY, every=EVERY, warmup=0.0),
}
LIMITS = {"dpf": 1.05, "dcil": 2.10, "memory": 2.0, "planning": 0.2}
PLAIN, AGAIN, MEMORY, PLANNING = "sgd", "sgd, again", "memory", "planning"
SIDES, PLANNED = (64, 224), 7
"""How often a DenseNet-121 is planned and pruned, after one run that is not counted."""

PRECISION = precision_for(torch.device("cpu"), "auto")
_PRECISION = "bfloat16" if PRECISION else "float32"

Step = Callable[[Batch], None]


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer over everything trainable in it."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.SGD(learning, lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)


def plain() -> Step:
    """Return the network's step on the labels."""
    network = TRAINED["resnet20"].network().train()
    set_layout(network, torch.channels_last)
    optimizer = sgd(network)

    def step(batch: Batch) -> None:
        with torch.autocast("cpu", PRECISION, enabled=PRECISION is not None):
            loss = F.cross_entropy(network(batch.images), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def masked(name: str) -> Step:
    """Return the step of a method, with its hooks around it."""
    attached = METHODS[name].attach(TRAINED["resnet20"].network(), AttachContext(steps=STEPS))
    attached.begin()
    objective = Objective(attached.model, attached.terms, label_weight=attached.label_weight, autocast=PRECISION)
    set_layout(objective.train(), torch.channels_last)
    optimizer = sgd(objective)
    attached.bind(optimizer, start=STEPS // 5)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        torch.stack([*objective(batch).values()]).sum().backward()
        optimizer.step()

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


def measure_time(rounds: int) -> None:
    """Write a row for each method."""
    keep_freed_memory()
    steps = {PLAIN: plain(), AGAIN: plain(), **{name: masked(name) for name in METHODS}}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    draw, given = torch.Generator().manual_seed(0), batches()
    for _ in range(WARM_ROUNDS + rounds):
        group = [next(given) for _ in range(EVERY)]
        for place in torch.randperm(len(steps), generator=draw).tolist():
            name = list(steps)[place]
            begun = time.perf_counter()
            for batch in group:
                steps[name](batch)
            seconds[name].append((time.perf_counter() - begun) / EVERY)
    counted = {name: times[WARM_ROUNDS:] for name, times in seconds.items()}
    for name in (AGAIN, *METHODS):
        ratios = [own / other for own, other in zip(counted[name], counted[PLAIN], strict=True)]
        identity = {"what": name, "network": "resnet20", "batch": BATCH, "every": EVERY}
        identity["precision"] = _PRECISION
        numbers = {"ratio": statistics.median(ratios), "seconds": statistics.median(counted[name]), "n": rounds}
        rows.add(RESULT, identity, {**numbers, "spread": rows.spread(ratios)}, [0])


def allocated(work: Callable[[], object]) -> int:
    """Return the peak of allocated bytes while it works, beyond those allocated before."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        found = work()
    del found
    events = (each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]")
    now = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure_memory() -> None:
    """Write the row of a global threshold."""
    weights = {name: layer.weight.detach() for name, layer in prunable(TRAINED["resnet56"].network()).items()}

    def found() -> object:
        scores = {name: weight.abs().flatten() for name, weight in weights.items()}
        return masks(scores, {name: weight.shape for name, weight in weights.items()}, SPARSITY, "global")

    found()
    peak, held = allocated(found), sum(weight.nbytes for weight in weights.values())
    identity = {"what": MEMORY, "network": "resnet56"}
    numbers = {"ratio": peak / held, "bytes": peak, "n": 1, "spread": rows.spread([peak / held])}
    rows.add(RESULT, identity, numbers, [0])


def planned(model: nn.Module, image: torch.Tensor) -> None:
    """Capture, plan, and remove half of the channels of every group."""
    graph = capture(model, image)
    groups, _ = coupled_channels(graph, image)
    remove(graph, merge_cuts(cut for group in groups for cut in group.cuts(range(len(group.slices) // 2))))


def planned_by_torch_pruning(model: nn.Module, image: torch.Tensor) -> None:
    """Remove half of the channels of every layer except the last with torch-pruning."""
    importance = torch_pruning.importance.MagnitudeImportance(p=2)
    options = {"pruning_ratio": 0.5, "ignored_layers": [model.get_submodule("classifier")]}
    torch_pruning.pruner.MagnitudePruner(model, image, importance=importance, **options).step()


def measure_planning(pixels: int) -> None:
    """Write the row of planning and pruning at one image size."""
    torch.manual_seed(0)
    model, image = torchvision.models.densenet121().eval(), torch.randn(1, 3, pixels, pixels)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(1 + PLANNED):
        for name, plan in (("ours", planned), ("theirs", planned_by_torch_pruning)):
            copied = copy.deepcopy(model)
            begun = time.perf_counter()
            plan(copied, image)
            seconds[name].append(time.perf_counter() - begun)
    ours, theirs = (times[1:] for times in seconds.values())
    ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
    numbers = {"ratio": statistics.median(ratios), "seconds": statistics.median(ours), "n": PLANNED}
    numbers["seconds_of_torch_pruning"] = statistics.median(theirs)
    identity = {"what": PLANNING, "network": "densenet121", "pixels": pixels}
    rows.add(RESULT, identity, {**numbers, "spread": rows.spread(ratios)}, [0])


def show() -> None:
    """Print the rows of this machine and their limits."""
    over = "over plain SGD, the weights' bytes, torch-pruning"
    table = Table("what", "seconds", over, "p10 to p90", "limit")
    for row in rows.read(RESULT):
        if row["machine"] == rows.machine():
            spread = f"{row['spread']['p10']:.3f} to {row['spread']['p90']:.3f}"
            limit = f"{LIMITS[row['what']]:.2f}" if row["what"] in LIMITS else ""
            seconds = f"{row['seconds']:.3f}" if "seconds" in row else ""
            table.add_row(row["what"], seconds, f"{row['ratio']:.3f}", spread, limit)
    Console(width=110).print(table)


def main() -> None:
    """Measure all methods in one run, if rows are missing, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure existing rows again")
    parser.add_argument("--table", action="store_true", help="only print existing rows")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of 16 steps for each contender")
    chosen = parser.parse_args()
    if not chosen.table:
        torch.set_num_threads(2)
        with rows.alone():
            for pixels in SIDES:
                if chosen.again or not rows.known(RESULT, {"what": PLANNING, "pixels": pixels}):
                    measure_planning(pixels)
            if chosen.again or not rows.known(RESULT, {"what": MEMORY}):
                measure_memory()
            if chosen.again or not all(rows.known(RESULT, {"what": name, "precision": _PRECISION}) for name in METHODS):
                measure_time(chosen.rounds)
    show()


if __name__ == "__main__":
    main()
