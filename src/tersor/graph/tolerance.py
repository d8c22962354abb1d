"""Layers that cost too much stay in float: as few as it takes for the network to answer as well as it has to."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tersor.core.attachment import Progress
from tersor.core.errors import InputError
from tersor.core.objective import images_of, labels_of
from tersor.core.target import Target
from tersor.graph.placement import edges
from tersor.graph.quantizers import Quantizers

JUDGED = 2000
_RANKED = 256


@dataclass(frozen=True)
class Kept:
    """What was left in float.

    Attributes:
        layers: their names, the costliest first.
        drop: what the network answers worse now, in points of accuracy, or in percent of other answers where the
            images came without labels.
    """

    layers: tuple[str, ...]
    drop: float


class _Judge:
    """Images, and what the network in float answers to them."""

    def __init__(self, graph: fx.GraphModule, data: Iterable[Any], method: str) -> None:
        self.graph = graph
        device = next(graph.parameters()).device
        self.images: list[Tensor] = []
        labels: list[Tensor | None] = []
        for batch in data:
            self.images.append(images_of(batch).to(device))
            labels.append(labels_of(batch))
            if sum(map(len, self.images)) >= JUDGED:
                break
        if not self.images:
            raise InputError(f"{method} was given data that cannot be read again. Pass a DataLoader or a list.")
        self.logits = self.asked(self.images)
        told = [each for each in labels if each is not None]
        self.truth = torch.cat(told).to(device) if len(told) == len(labels) else self.logits.argmax(1)
        self.right = self._percent(self.logits)
        some = torch.cat(self.images)[:_RANKED]
        self.some = list(some.split(len(self.images[0])))

    @torch.inference_mode()
    def asked(self, images: list[Tensor]) -> Tensor:
        """Logits (N, classes) of the network as it is now."""
        return torch.cat([self.graph(batch) for batch in images])

    def _percent(self, logits: Tensor) -> float:
        return 100 * float((logits.argmax(1) == self.truth).float().mean())

    def drop(self) -> float:
        """Points of accuracy that the network answers worse than in float."""
        return self.right - self._percent(self.asked(self.images))

    def error(self) -> float:
        """Mean squared difference of some logits from those in float."""
        return float((self.asked(self.some) - self.logits[: len(torch.cat(self.some))]).square().mean())


def keep_in_float(
    quantizers: Quantizers,
    bare: fx.GraphModule,
    data: Iterable[Any],
    *,
    max_drop: float,
    target: Target,
    method: str,
) -> Generator[Progress, None, Kept]:
    """Lets the costliest layers compute in float, as few as bring the drop down to `max_drop`.

    A layer costs what the logits gain when it alone is in float; how many go is found by bisection.

    Args:
        quantizers: on the network, all of which round.
        bare: the same network without quantizers.
        data: batches of images, with labels or without; the first 2,000 images are looked at.
        max_drop: points of accuracy, or percent of other answers where there are no labels.
        target: whose runtime says where activations are rounded.
        method: how errors call who asks.

    Raises:
        InputError: the data cannot be read again.
    """
    every = set(quantizers.layers)

    def let(rounding: set[str]) -> None:
        needed = edges(bare, rounding, target.runtime) if rounding else set[str]()
        for name in quantizers.layers:
            quantizers.of_weight(name).ready = name in rounding
        for name in quantizers.activations:
            quantizers.of_activation(name).ready = name in needed

    let(set())
    judge = _Judge(quantizers.graph, data, method)
    let(every)
    drop = judge.drop()
    if drop <= max_drop:
        return Kept((), drop)
    what, total = "layers that cost too much", len(every) + len(every).bit_length()
    errors: dict[str, float] = {}
    for number, name in enumerate(quantizers.layers, 1):
        let(every - {name})
        errors[name] = judge.error()
        yield Progress(what, number, total)
    costliest = sorted(quantizers.layers, key=lambda name: errors[name])
    too_few, enough, drop = 0, len(costliest), 0.0
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        let(every - set(costliest[:middle]))
        found = judge.drop()
        if found <= max_drop:
            enough, drop = middle, found
        else:
            too_few = middle
    let(every - set(costliest[:enough]))
    yield Progress(what, total, total)
    return Kept(tuple(costliest[:enough]), drop)
