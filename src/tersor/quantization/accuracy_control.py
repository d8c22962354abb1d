"""Accuracy control: keeps the most sensitive layers in float, as few as a limit on the metric's drop allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from tersor.core.errors import InputError
from tersor.core.progress import NO_PROGRESS, ProgressReporter
from tersor.core.target import Target
from tersor.data.batch import Batch
from tersor.data.network_inputs import NetworkInput
from tersor.graph.eval_mode import first_images
from tersor.graph.forward_call import run
from tersor.quantization.quantizers import Quantizers
from tersor.tasks.calibration_batch import read_batch
from tersor.tasks.classification import CLASSIFICATION
from tersor.tasks.network_outputs import relative_squared_error_of_all
from tersor.tasks.task import Task

EVALUATED = 2000
_RANKED = 256


@dataclass(frozen=True)
class FloatLayers:
    """The layers left in float.

    Attributes:
        layers: their names, the most sensitive first.
        drop: the remaining drop in the metric (accuracy in points); without labels, the percentage of predictions
            that changed.
        labelled: whether it is the drop in the metric.
    """

    layers: tuple[str, ...]
    drop: float
    labelled: bool


class _Reference:
    """Images with their targets, and the outputs of the float network for them."""

    def __init__(self, graph: fx.GraphModule, data: Iterable[Any], method: str, task: Task) -> None:
        self.graph, self.task = graph, task
        device = next(graph.parameters()).device
        batches: list[Batch] = []
        left = EVALUATED
        for batch in data:
            found = read_batch(batch, task, left)
            if len(found.images):
                batches.append(found)
            left -= len(found.images)
            if left <= 0:
                break
        if not batches:
            raise InputError(
                f"{method} reads the data several times, but the data cannot be read again. "
                "Pass a DataLoader or a list."
            )
        self.images = [batch.images.to(device) for batch in batches]
        self.predictions = self._predictions()
        self.targets = self.predictions if task.from_original else [batch.targets for batch in batches]
        self.labelled = all(each is not None for each in self.targets)
        self.score = self._score(self.predictions) if self.labelled else 0.0
        self.few = list(first_images(self.images, _RANKED, device))
        self.few_outputs = list(self._outputs(self.few))

    def _outputs(self, images: Iterable[NetworkInput]) -> Iterator[Any]:
        for batch in images:
            with torch.inference_mode():
                yield run(self.graph, batch)

    def _predictions(self) -> list[Any]:
        return [self.task.predictions(outputs) for outputs in self._outputs(self.images)]

    def _score(self, predictions: list[Any]) -> float:
        return self.task.score(zip(predictions, self.targets, strict=True))

    def drop(self) -> float:
        """The current drop in the metric against float; without targets, percentage of changed predictions."""
        predictions = self._predictions()
        if self.labelled:
            worse = self.score - self._score(predictions)
            return worse if self.task.higher_is_better else -worse
        same = [self.task.agreement(*both) for both in zip(predictions, self.predictions, strict=True)]
        return 100 * (1 - float(torch.cat(same).mean()))

    def error(self) -> float:
        """Distance of the outputs for some images from those in float."""
        return relative_squared_error_of_all(zip(self._outputs(self.few), self.few_outputs, strict=True))


def keep_in_float(
    quantizers: Quantizers,
    data: Iterable[Any],
    *,
    max_drop: float,
    target: Target,
    method: str,
    refit: Callable[[], None] = lambda: None,
    progress: ProgressReporter = NO_PROGRESS,
    task: Task = CLASSIFICATION,
) -> FloatLayers:
    """Keep the most sensitive layers in float, as few as possible for a drop of at most `max_drop`.

    A layer's sensitivity is the error of the outputs when it alone is quantized. The drop in the metric when one layer
    alone is in float is not used: if two sensitive layers follow each other, keeping one of them in float does not
    help. Bisection finds the number.

    Args:
        quantizers: quantizers of the network, all enabled.
        data: batches of images, with targets or without; the first 2,000 images are used.
        max_drop: largest drop in the metric (accuracy in points); without targets, percentage of changed predictions.
        target: its runtime determines which activations are quantized.
        method: the method's name, for error messages.
        refit: refits biases to the enabled quantizers; undoes that if none is enabled.
        progress: reports the number of layers.
        task: gives the metric.

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
    reference = _Reference(quantizers.graph, data, method, task)
    drop = drop_without(())
    if drop <= max_drop:
        return FloatLayers((), drop, reference.labelled)
    enable(set())
    refit()
    most_sensitive = _most_sensitive_first(quantizers, enable, reference, progress)
    too_few, enough, drop = 0, len(most_sensitive), 0.0
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        found = drop_without(most_sensitive[:middle])
        if found <= max_drop:
            enough, drop = middle, found
        else:
            too_few = middle
    enable(every.difference(most_sensitive[:enough]))
    refit()
    return FloatLayers(tuple(most_sensitive[:enough]), drop, reference.labelled)


def _most_sensitive_first(
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
