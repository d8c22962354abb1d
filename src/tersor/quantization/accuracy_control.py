"""Layers that cost too much stay in float: as few as it takes for the network to answer as well as it has to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tersor.core.errors import InputError
from tersor.core.progress import NO_PROGRESS, ProgressReporter
from tersor.core.target import Target
from tersor.data.batch import images_of, labels_of
from tersor.quantization.qdq_placement import activation_quantizers
from tersor.quantization.quantizers import Quantizers

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
        left = JUDGED
        for batch in data:
            found, told = images_of(batch)[:left], labels_of(batch)
            if len(found):
                self.images.append(found.to(device))
                labels.append(None if told is None else told[:left].to(device))
            left -= len(found)
            if left <= 0:
                break
        if not self.images:
            raise InputError(f"{method} was given data that cannot be read again. Pass a DataLoader or a list.")
        self.logits = self.asked(self.images)
        told = [each for each in labels if each is not None]
        self.truth = torch.cat(told) if len(told) == len(labels) else self.logits.argmax(1)
        self.right = self._percent(self.logits)
        self.some = [*torch.cat([batch[:_RANKED] for batch in self.images])[:_RANKED].split(len(self.images[0]))]

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
        return float((self.asked(self.some) - self.logits[:_RANKED]).square().mean())


class _Rounding:
    """Which layers of a network round, and the activations that these need."""

    def __init__(self, quantizers: Quantizers, bare: fx.GraphModule, target: Target) -> None:
        self.quantizers = quantizers
        self._bare = bare
        self._target = target

    def set(self, layers: set[str]) -> None:
        needed = activation_quantizers(self._bare, layers, self._target.runtime)
        for name in self.quantizers.layers:
            self.quantizers.of_weight(name).enabled = name in layers
        for name in self.quantizers.activations:
            self.quantizers.of_activation(name).enabled = name in needed


def keep_in_float(
    quantizers: Quantizers,
    bare: fx.GraphModule,
    data: Iterable[Any],
    *,
    max_drop: float,
    target: Target,
    method: str,
    settle: Callable[[], None] = lambda: None,
    progress: ProgressReporter = NO_PROGRESS,
) -> Kept:
    """Lets the costliest layers compute in float, as few as bring the drop down to `max_drop`.

    A layer costs what the logits lose when it alone rounds (of two broken layers in a row, neither gains anything by
    being in float alone); how many go is found by bisection.

    Args:
        quantizers: on the network, all of which round.
        bare: the same network without quantizers.
        data: batches of images, with labels or without; the first 2,000 images are looked at.
        max_drop: points of accuracy, or percent of other answers where there are no labels.
        target: whose runtime says where activations are rounded.
        method: how errors call who asks.
        progress: reports the layers.
        settle: fits what follows from which layers round (biases), and undoes it where none does.

    Raises:
        InputError: the data cannot be read again.
    """
    every, rounding = set(quantizers.layers), _Rounding(quantizers, bare, target)

    def drop_without(layers: Iterable[str]) -> float:
        rounding.set(every.difference(layers))
        settle()
        return judge.drop()

    rounding.set(set())
    settle()
    judge = _Judge(quantizers.graph, data, method)
    drop = drop_without(())
    if drop <= max_drop:
        return Kept((), drop)
    rounding.set(set())
    settle()
    costliest = _costliest_first(rounding, judge, progress)
    too_few, enough, drop = 0, len(costliest), 0.0
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        found = drop_without(costliest[:middle])
        if found <= max_drop:
            enough, drop = middle, found
        else:
            too_few = middle
    rounding.set(every.difference(costliest[:enough]))
    settle()
    return Kept(tuple(costliest[:enough]), drop)


def _costliest_first(rounding: _Rounding, judge: _Judge, progress: ProgressReporter) -> list[str]:
    layers = rounding.quantizers.layers
    errors: dict[str, float] = {}
    progress.start("error of each quantized layer", len(layers))
    for name in layers:
        rounding.set({name})
        errors[name] = judge.error()
        progress.advance()
    return sorted(layers, key=errors.__getitem__, reverse=True)
