"""Accuracy control: leaves the most harmful layers in float, as few as meet a largest accuracy drop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from tersor.core.errors import InputError
from tersor.core.progress import NO_PROGRESS, ProgressReporter
from tersor.core.target import Target
from tersor.data.batch import images_of, labels_of
from tersor.quantization.quantizers import Quantizers

EVALUATED = 2000
_RANKED = 256


@dataclass(frozen=True)
class FloatLayers:
    """The layers left in float.

    Attributes:
        layers: their names, the most harmful first.
        drop: the remaining accuracy drop in points; without labels, the percentage of predictions that changed.
    """

    layers: tuple[str, ...]
    drop: float


class _Reference:
    """Images, and the predictions of the network in float for them."""

    def __init__(self, graph: fx.GraphModule, data: Iterable[Any], method: str) -> None:
        self.graph = graph
        device = next(graph.parameters()).device
        self.images: list[Tensor] = []
        labels: list[Tensor | None] = []
        left = EVALUATED
        for batch in data:
            found, truth = images_of(batch)[:left], labels_of(batch)
            if len(found):
                self.images.append(found.to(device))
                labels.append(None if truth is None else truth[:left].to(device))
            left -= len(found)
            if left <= 0:
                break
        if not self.images:
            raise InputError(
                f"{method} reads the data several times, but the data cannot be read again. "
                "Pass a DataLoader or a list."
            )
        self.logits = self.logits_of(self.images)
        known = [each for each in labels if each is not None]
        self.truth = torch.cat(known) if len(known) == len(labels) else self.logits.argmax(1)
        self.accuracy = self._percent(self.logits)
        self.few = [*torch.cat([batch[:_RANKED] for batch in self.images])[:_RANKED].split(len(self.images[0]))]

    @torch.inference_mode()
    def logits_of(self, images: list[Tensor]) -> Tensor:
        """Current logits (N, classes) of the network."""
        return torch.cat([self.graph(batch) for batch in images])

    def _percent(self, logits: Tensor) -> float:
        return 100 * float((logits.argmax(1) == self.truth).float().mean())

    def drop(self) -> float:
        """The current accuracy drop against float, in points."""
        return self.accuracy - self._percent(self.logits_of(self.images))

    def error(self) -> float:
        """Mean squared difference of the logits of some images from those in float."""
        return float((self.logits_of(self.few) - self.logits[:_RANKED]).square().mean())


def keep_in_float(
    quantizers: Quantizers,
    data: Iterable[Any],
    *,
    max_drop: float,
    target: Target,
    method: str,
    refit: Callable[[], None] = lambda: None,
    progress: ProgressReporter = NO_PROGRESS,
) -> FloatLayers:
    """Leave the most harmful layers in float, as few as bring the drop down to `max_drop`.

    A layer's harm is the error of the logits when it alone is quantized: of two bad layers in a row, putting only one
    in float would not help. Bisection finds their number.

    Args:
        quantizers: of the network, all enabled.
        data: batches of images, with labels or without; the first 2,000 images are used.
        max_drop: largest accuracy drop in points; without labels, percentage of changed predictions.
        target: its runtime determines which activations are quantized.
        method: the method's name, for error messages.
        progress: reports the number of layers.
        refit: refits biases to the enabled quantizers; undoes that if none is enabled.

    Raises:
        InputError: the data cannot be read again.
    """
    every = {*quantizers.layers, *quantizers.products}
    enable = partial(quantizers.enable, target=target)

    def drop_without(layers: Iterable[str]) -> float:
        enable(every.difference(layers))
        refit()
        return reference.drop()

    enable(set())
    refit()
    reference = _Reference(quantizers.graph, data, method)
    drop = drop_without(())
    if drop <= max_drop:
        return FloatLayers((), drop)
    enable(set())
    refit()
    most_harmful = _most_harmful_first(quantizers, enable, reference, progress)
    too_few, enough, drop = 0, len(most_harmful), 0.0
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        found = drop_without(most_harmful[:middle])
        if found <= max_drop:
            enough, drop = middle, found
        else:
            too_few = middle
    enable(every.difference(most_harmful[:enough]))
    refit()
    return FloatLayers(tuple(most_harmful[:enough]), drop)


def _most_harmful_first(
    quantizers: Quantizers, enable: Callable[[set[str]], None], reference: _Reference, progress: ProgressReporter
) -> list[str]:
    layers = (*quantizers.layers, *quantizers.products)
    errors: dict[str, float] = {}
    progress.start("error of each quantized layer", len(layers))
    for name in layers:
        enable({name})
        errors[name] = reference.error()
        progress.advance()
    return sorted(layers, key=errors.__getitem__, reverse=True)
