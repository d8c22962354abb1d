"""Compare the throughput of tersor's training loop with that of a loop written by hand.

Network, images, precision and layout are the same. Blocks of steps alternate in one run: tersor's, then the bare loop
twice (two networks, in changing order). A ratio compares blocks that follow each other; bare against bare is the noise
floor. Ratios are throughputs: above 1, the first is faster.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import rows
from tersor.core.device import precision_for
from tersor.core.progress import NullProgress
from tersor.data.batches import Batches
from tersor.data.image_sets import Pixels
from tersor.models import build
from tersor.training.attachment import Attachment
from tersor.training.loop import fit
from tersor.training.options import Training

SEED = 0
WARM_BLOCKS = 2
PAIRS = (("tersor", "bare"), ("bare", "bare again"))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISION = precision_for(DEVICE, "auto")


def random_batches(batch_size: int, count: int = 20) -> Batches:
    """Return batches of random pixels (3, 32, 32) in ten classes, augmented like CIFAR."""
    draw = torch.Generator().manual_seed(SEED)
    pixels = torch.randint(256, (count * batch_size, 32, 32, 3), dtype=torch.uint8, generator=draw)
    labels = torch.randint(10, (len(pixels),), generator=draw)
    half = (0.5, 0.5, 0.5)
    images = Pixels(pixels, labels)
    return Batches(images, batch_size, mean=half, std=half, shuffle=True, seed=SEED, augment="crop_flip")


def network(name: str) -> nn.Module:
    """Return the network with the same weights at every call."""
    torch.manual_seed(SEED)
    return build(name, 10)


def bare_loop(model: nn.Module, batches: Batches, steps: int) -> Iterator[None]:
    """Train without a toolkit; one step for every `next`."""
    model = model.to(DEVICE).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in itertools.count():
        batches.set_epoch(epoch)
        for batch in (batch.to(DEVICE) for batch in batches):
            images = batch.images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(DEVICE.type, PRECISION, enabled=PRECISION is not None):
                loss = F.cross_entropy(model(images), batch.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            yield


class Interleaved(NullProgress):
    """Interrupt tersor's training after each of its blocks for a block of every bare loop."""

    def __init__(self, others: dict[str, Iterator[None]], block: int) -> None:
        self.others = others
        self.block = block
        self.seconds: dict[str, list[float]] = {name: [] for name in ("tersor", *others)}
        self.steps = 0
        self.begun = 0.0

    def start(self, task: str, total: int) -> None:
        """Start the first block."""
        self.begun = now()

    def advance(self, items: int = 1, **values: float) -> None:
        """Count one step of tersor's loop."""
        self.steps += items
        if self.steps % self.block:
            return
        self.seconds["tersor"].append(now() - self.begun)
        order = list(self.others.items())
        for name, other in order if self.steps // self.block % 2 else reversed(order):
            begun = now()
            for _ in range(self.block):
                next(other)
            self.seconds[name].append(now() - begun)
        self.begun = now()


def now() -> float:
    """Return the time after all started work has finished."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(name: str, batch_size: int, block: int, blocks: int) -> dict[str, list[float]]:
    """Return the seconds of each block for each loop, without the first few."""
    steps = block * (blocks + WARM_BLOCKS)
    others = {other: bare_loop(network(name), random_batches(batch_size), steps) for other in ("bare", "bare again")}
    progress = Interleaved(others, block)
    fit(Attachment(network(name)), random_batches(batch_size), Training(), steps=steps, progress=progress, seed=SEED)
    return {loop: seconds[WARM_BLOCKS:] for loop, seconds in progress.seconds.items()}


def main() -> None:
    """Measure what `bench/results/loop.json` does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--block", type=int, default=5, help="steps in a block")
    parser.add_argument("--blocks", type=int, default=20, help="blocks of each loop")
    parser.add_argument("--again", action="store_true", help="measure existing rows again")
    chosen = parser.parse_args()
    precision = "bfloat16" if PRECISION else "float32"
    with rows.alone():
        for name in chosen.models:
            what = {"model": name, "batch": chosen.batch, "precision": precision, "block": chosen.block}
            identities = [{"pair": " / ".join(pair), **what, "blocks": chosen.blocks} for pair in PAIRS]
            if not chosen.again and all(rows.known("loop", identity) for identity in identities):
                print(f"{name}: has a row (--again measures it again)")
                continue
            seconds = measure(name, chosen.batch, chosen.block, chosen.blocks)
            for (ours, theirs), identity in zip(PAIRS, identities, strict=True):
                report(identity, seconds[ours], seconds[theirs], chosen.block * chosen.batch)


def report(identity: dict[str, Any], ours: list[float], theirs: list[float], images: int) -> None:
    """Write one row: the ratio of the throughputs, block by block."""
    ratios = [other / own for own, other in zip(ours, theirs, strict=True)]
    numbers = {
        "throughput_ratio": statistics.median(ratios),
        "images_per_second": [images / statistics.median(times) for times in (ours, theirs)],
        "n": len(ratios),
        "spread": rows.spread(ratios),
    }
    rows.add("loop", identity, numbers, [SEED])
    print(f"{identity['model']} {identity['pair']}: {numbers['throughput_ratio']:.3f} {numbers['spread']}")


if __name__ == "__main__":
    main()
