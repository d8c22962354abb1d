"""Whether `importance: obs` knows what is lost: a trained ResNet-56 without channels, nothing trained.

Of one inner layer after the other a half and three quarters of the channels go: what `obs` says is lost by them stands
beside the KL divergence from the original, mean over 1,024 augmented training images. Then half of all MACs go from all
inner layers, by each importance and scope. Channels are removed as a user removes them: filters fitted, BatchNorm's
statistics moved; the last rows let residual branches go before. Of test images nothing is looked at.
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
"""What writes the residual stream, which stays whole."""

GONE = (0.5, 0.75)
WHOLE = (
    ("magnitude", "layer", 0),
    ("magnitude", "global", 0),
    ("obs", "layer", 0),
    *(("obs", "global", branches) for branches in range(4)),
)
KEEP = 0.502


def batches() -> Batches:
    """What methods look at."""
    return Batches(cifar().train, 64, mean=MEAN, std=STD, shuffle=True, seed=0)


@cache
def watched() -> tuple[Tensor, ...]:
    """Augmented training images (256, 3, 32, 32) at a time."""
    drawn = Batches(cifar().train, 256, mean=MEAN, std=STD, shuffle=True, seed=7, augment="crop_flip")
    return tuple(batch.images for batch, _ in zip(drawn, range(4), strict=False))


@torch.inference_mode()
def answers(model: nn.Module) -> Tensor:
    """(1024, 10), logarithms of probabilities."""
    return torch.cat([model(images).log_softmax(1) for images in watched()])


@cache
def original() -> tuple[fx.GraphModule, Tensor]:
    """Captured, and its answers."""
    graph = capture(SUBJECT.network()).eval()
    return graph, answers(graph)


@cache
def said() -> tuple[list[Group], list[Tensor]]:
    """The inner layers' groups, and what `obs` says of each, lowest first."""
    graph, _ = original()
    groups, _ = removable_groups(graph, EXAMPLE, STREAM, "channel_pruning")
    found = importances("obs", graph, groups, data=batches(), images=ChannelPruning.importance_images, seed=0)
    return groups, [each.sort().values for each in found if each is not None]


def pruned(method: ChannelPruning) -> tuple[float, float]:
    """KL divergence of what is left from the original, and how many times fewer MACs it has."""
    attached = method.attach(SUBJECT.network(), AttachContext(data=batches()))
    attached.begin()
    graph, before = original()
    after = answers(attached.model.eval())
    fewer = costs(graph, EXAMPLE).macs / costs(attached.model, EXAMPLE).macs
    return float((before.exp() * (before - after)).sum(1).mean()), fewer


def one_layer(number: int, gone: float) -> None:
    """The row of a layer."""
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
    print(f"{group.root}, {gone:.0%}: {divergence:.4f}, said {told:.4f}", flush=True)


def all_layers(importance: str, scope: str, branches: int) -> None:
    """The row of a removal of half of the MACs, that of so many branches among them."""
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
    """Correlation and slope."""
    said, seen = zip(*logarithms, strict=True)
    return statistics.correlation(said, seen), statistics.linear_regression(said, seen).slope


def show() -> None:
    """Prints the rows of this machine."""
    here = rows.machine()
    found = [row for row in rows.read(RESULT) if row["machine"] == here]
    layers = [row for row in found if row["kind"] == "layer"]
    console = Console(width=100)
    if len(layers) > 1:
        correlation, slope = fit([(math.log(row["said"]), math.log(row["divergence"])) for row in layers])
        console.print(f"{len(layers)} prunings of a layer: logarithms correlate {correlation:.2f}, slope {slope:.2f}")
    heads = ("importance", "scope", "branches gone", "KL divergence", "fewer MACs")
    table = Table(*heads, title="all inner layers", title_justify="left")
    for row in [row for row in found if row["kind"] == "network"]:
        numbers = f"{row['divergence']:.3f}", f"{row['macs_ratio']:.2f}x"
        table.add_row(row["importance"], row["scope"], str(row.get("branches", 0)), *numbers)
    console.print(table)


def main() -> None:
    """Measures what is not in `bench/results/pruning_losses.json` yet, and prints all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="measure nothing, print what is there")
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
