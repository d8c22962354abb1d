"""Sensitivity: the output error when the weight of a single layer is quantized and all else stays in float.

    error(l, b) = sum over images of |y_lb - y|^2 / sum over images of |y|^2         y, y_lb: outputs (N, ...)

y are the network's outputs in float, y_lb those with the weight of layer l at b bits. With several output tensors, the
error is the mean over the tensors. Needs no labels; with labels, the drop in the task's metric is measured too.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.target import Target
from tersor.data.batch import Batch
from tersor.graph.eval_mode import evaluating
from tersor.graph.forward_call import run
from tersor.quantization.grid import Grid
from tersor.quantization.observers import WeightRange
from tersor.quantization.quantizers import Quantizers
from tersor.tasks.calibration_batch import read_batch
from tersor.tasks.classification import CLASSIFICATION
from tersor.tasks.network_outputs import floats_of_both, relative_squared_error_of_all
from tersor.tasks.task import Task

KEPT_BYTES = 2**30
"""Most bytes of float outputs to keep: with maps of many classes, those of all images can exceed the memory."""


@dataclass(frozen=True)
class Cost:
    """The cost of quantizing the weight of one layer."""

    __pydantic_config__ = ConfigDict(use_attribute_docstrings=True)
    layer: str
    """Name of the layer."""
    bits: int
    """Bit width of its weight."""
    error: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Mean squared difference of the outputs from those in float, as a fraction of their mean square."""
    drop: float | None
    """Drop in the metric (accuracy in points), positive where it is worse; none if the images have no labels."""


def sensitivity(
    quantizers: Quantizers,
    data: Iterable[Any],
    candidates: Iterable[tuple[str, int]],
    *,
    target: Target,
    weight_range: WeightRange = "mse",
    percentile: float = 99.99,
    task: Task = CLASSIFICATION,
) -> Iterator[Cost]:
    """Measure the cost of each layer and width, one at a time, when the iterator reaches it.

    Args:
        quantizers: quantizers of the network, all disabled; they stay disabled.
        data: batches of images (N, C, H, W), with targets or without; every iteration yields the same.
        candidates: names of layers, and bits.
        target: processor that the network is compressed for.
        weight_range: how a weight's range is chosen.
        percentile: percent of the values inside the range, for `weight_range: percentile`.
        task: gives the metric.

    Raises:
        InputError: the data contains no image, an output is not finite, or the outputs hold no floating-point tensor.
    """
    assert not quantizers.enabled
    reference = _Reference(quantizers, data, task)
    before = reference.score()
    for layer, bits in candidates:
        with _quantized(quantizers, layer, bits):
            quantizers.set_weight_grid(layer, target, weight_range, percentile)
            error, score = reference.compared(layer)
        change = None if before is None or score is None else score - before
        drop = -change if change is not None and task.higher_is_better else change
        yield Cost(layer, bits, error, drop)  # outside the `with`: the network is in float while the caller runs


@contextmanager
def _quantized(quantizers: Quantizers, layer: str, bits: int) -> Generator[None]:
    """Gives one layer's weight another grid; then restores its quantizer, except for the scale, which is not in use."""
    quantizer = quantizers.of_weight(layer)
    before = quantizer.grid
    quantizer.grid = Grid.signed(bits)
    try:
        yield
    finally:
        quantizer.grid, quantizer.enabled = before, False


class _Reference:
    """The network in float, for the same batches again and again.

    Its outputs are kept for the first batches, up to `KEPT_BYTES`. Those of the others are computed again each time.

    Args:
        quantizers: quantizers of the network.
        data: as for `sensitivity`.
        task: as for `sensitivity`.
    """

    def __init__(self, quantizers: Quantizers, data: Iterable[Any], task: Task) -> None:
        self._quantizers = quantizers
        self._data = data
        self._task = task
        self._kept: list[Any] = []
        self._labelled = True

    def score(self) -> float | None:
        """The metric of the network in float; None without targets.

        Raises:
            InputError: there is no image, or an output is not finite.
        """
        images, room = 0, KEPT_BYTES
        pairs: list[tuple[Any, Any]] = []
        for batch in self._batches():
            outputs = self._run(batch)
            floats = [each for each, _ in floats_of_both(outputs, outputs)]
            _require_finite(floats)
            images += len(batch.images)
            room -= sum(each.nbytes for each in floats)
            if room >= 0:
                self._kept.append(outputs)
            self._labelled &= batch.targets is not None
            if self._labelled:
                pairs.append((self._task.predictions(outputs), batch.targets))
        if not images:
            raise InputError("the data contains no images. Pass batches (N, C, H, W).")
        return self._task.score(pairs) if self._labelled else None

    def compared(self, layer: str) -> tuple[float, float | None]:
        """Relative error of the outputs with the weight of `layer` quantized, and their metric."""
        pairs: list[tuple[Any, Any]] = []

        def outputs_of_both() -> Iterator[tuple[Any, Any]]:
            for number, batch in enumerate(self._batches()):
                now = self._run(batch)
                if self._labelled:
                    pairs.append((self._task.predictions(now), batch.targets))
                yield now, self._kept[number] if number < len(self._kept) else self._in_float(layer, batch)

        error = relative_squared_error_of_all(outputs_of_both())
        return error, self._task.score(pairs) if self._labelled else None

    def _batches(self) -> Iterator[Batch]:
        with evaluating(self._quantizers.graph):
            for batch in self._data:
                read = read_batch(batch, self._task)
                if len(read.images):
                    yield read

    def _run(self, batch: Batch) -> Any:
        graph = self._quantizers.graph
        with torch.inference_mode():
            return run(graph, batch.images.to(next(graph.parameters()).device))

    def _in_float(self, layer: str, batch: Batch) -> Any:
        quantizer = self._quantizers.of_weight(layer)
        quantizer.enabled = False
        try:
            return self._run(batch)
        finally:
            quantizer.enabled = True


def _require_finite(floats: Iterable[Tensor]) -> None:
    if not all(torch.isfinite(each).all() for each in floats):
        raise InputError(
            "the network's outputs are not finite for some images. Check images and weights for NaN, infinity and very "
            "large values."
        )
