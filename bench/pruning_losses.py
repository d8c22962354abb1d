"""Compare the loss that `importance: obs` predicts with the measured one, on a trained ResNet-56 without training.

One inner layer at a time loses a half or three quarters of its channels. The row holds the loss predicted by `obs` and
the KL divergence from the original, the mean over 1,024 augmented training images. Then half of all MACs are removed
from all inner layers, by each importance and scope. Channels are removed as for a user: filters refitted, BatchNorm
statistics shifted. The last rows remove residual branches first. No test images are used.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

import rows
from images import MEAN, STD, TRAINED, cifar
from tersor.data import Batches
from tersor.evaluation.costs import costs
from tersor.graph.capture import capture
from tersor.methods.channel_pruning import ChannelPruning
from tersor.pruning.channel_groups import Group
from tersor.pruning.channel_importance import importances
from tersor.pruning.channel_selection import removable_groups
from tersor.training.context import AttachContext

RESULT = "pruning_losses"
SUBJECT = TRAINED["resnet56"]
EXAMPLE = torch.zeros(1, 3, 32, 32)
STREAM = ("*.conv2",)
"""The layers that write the residual stream, which keeps its width."""

GONE = (0.5, 0.75)
WHOLE = (
    ("magnitude", "layer", 0),
    ("magnitude", "global", 0),
    ("obs", "layer", 0),
    *(("obs", "global", branches) for branches in range(4)),
)
KEEP = 0.502


def batches() -> Batches:
    """Return the training batches for the methods."""
    return Batches(cifar().train, 64, mean=MEAN, std=STD, shuffle=True, seed=0)


@cache
def watched() -> tuple[Tensor, ...]:
    """Return four batches of augmented training images (256, 3, 32, 32)."""
    drawn = Batches(cifar().train, 256, mean=MEAN, std=STD, shuffle=True, seed=7, augment="crop_flip")
    return tuple(batch.images for batch, _ in zip(drawn, range(4), strict=False))


@torch.inference_mode()
def answers(model: nn.Module) -> Tensor:
    """Return log-probabilities (1024, 10)."""
    return torch.cat([model(images).log_softmax(1) for images in watched()])


@cache
def original() -> tuple[fx.GraphModule, Tensor]:
    """Return the captured original and its log-probabilities."""
    graph = capture(SUBJECT.network(), EXAMPLE).eval()
    return graph, answers(graph)


@cache
def said() -> tuple[list[Group], list[Tensor]]:
    """Return the groups of the inner layers, and the losses that `obs` predicts for each, in ascending order."""
    graph, _ = original()
    groups, _ = removable_groups(graph, EXAMPLE, STREAM, "channel_pruning")
    found = importances("obs", graph, groups, data=batches(), images=ChannelPruning.importance_images, seed=0)
    return groups, [each.sort().values for each in found if each is not None]


def pruned(method: ChannelPruning) -> tuple[float, float]:
    """Return the KL divergence of the pruned network from the original, and the factor by which MACs fell."""
    attached = method.attach(SUBJECT.network(), AttachContext(data=batches()))
    attached.begin()
    graph, before = original()
    after = answers(attached.model.eval())
    fewer = costs(graph, EXAMPLE).macs / costs(attached.model, EXAMPLE).macs
    return float((before.exp() * (before - after)).sum(1).mean()), fewer


def one_layer(number: int, gone: float) -> None:
    """Write the row of one layer."""
    groups, losses = said()
    group = groups[number]
    identity = {"kind": "layer", "layer": group.root, "gone": gone}
    if rows.known(RESULT, identity):
        return
    others = tuple(each.root for each in groups if each is not group)
    method = ChannelPruning(keep_channels=1 - gone, importance="obs", round_to=1, exclude=(*STREAM, *others))
    divergence, _ = pruned(method)
    told = float(losses[number][: round(gone * len(group.slices))].sum())
    numbers = {"divergence": divergence, "said": told, "n": 1, "spread": rows.spread([divergence])}
    rows.add(RESULT, identity, numbers, [0])
    print(f"{group.root}, {gone:.0%}: {divergence:.4f}, predicted {told:.4f}", flush=True)


def all_layers(importance: str, scope: str, branches: int) -> None:
    """Write the row of a removal of half of the MACs, with `branches` residual branches removed first."""
    identity: dict[str, object] = {"kind": "network", "importance": importance, "scope": scope}
    identity |= {"branches": branches} if branches else {}
    if rows.known(RESULT, identity):
        return
    how: dict[str, Any] = {"importance": importance, "scope": scope, "branches": branches}
    divergence, fewer = pruned(ChannelPruning(keep_macs=KEEP, exclude=STREAM, **how))
    numbers = {"divergence": divergence, "macs_ratio": fewer, "n": 1, "spread": rows.spread([divergence])}
    rows.add(RESULT, identity, numbers, [0])
    print(f"{importance}, {scope}, {branches} branches: {divergence:.3f} at {fewer:.2f} times fewer MACs", flush=True)


def fit(logarithms: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return correlation and slope."""
    said, seen = zip(*logarithms, strict=True)
    return statistics.correlation(said, seen), statistics.linear_regression(said, seen).slope


def show() -> None:
    """Print the rows of this machine."""
    here = rows.machine()
    found = [row for row in rows.read(RESULT) if row["machine"] == here]
    layers = [row for row in found if row["kind"] == "layer"]
    console = Console(width=100)
    if len(layers) > 1:
        correlation, slope = fit([(math.log(row["said"]), math.log(row["divergence"])) for row in layers])
        console.print(
            f"{len(layers)} prunings of one layer: correlation of logarithms {correlation:.2f}, slope {slope:.2f}"
        )
    heads = ("importance", "scope", "branches gone", "KL divergence", "fewer MACs")
    table = Table(*heads, title="all inner layers", title_justify="left")
    for row in [row for row in found if row["kind"] == "network"]:
        numbers = f"{row['divergence']:.3f}", f"{row['macs_ratio']:.2f}x"
        table.add_row(row["importance"], row["scope"], str(row.get("branches", 0)), *numbers)
    console.print(table)


def main() -> None:
    """Measure what `bench/results/pruning_losses.json` does not have yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only print existing rows")
    if not parser.parse_args().table:
        torch.set_num_threads(2)
        with rows.alone():
            for importance, scope, branches in WHOLE:
                all_layers(importance, scope, branches)
            for number in range(len(said()[0])):
                for gone in GONE:
                    one_layer(number, gone)
    show()


if __name__ == "__main__":
    main()
