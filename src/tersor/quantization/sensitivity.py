"""Sensitivity: the output error when the weight of a single layer is quantized and all else stays in float.

    error(l, b) = sum over images of |y_lb - y|^2 / sum over images of |y|^2         y, y_lb: outputs (N, ...)

y are the network's outputs in float, y_lb those with the weight of layer l at b bits. With several output tensors, the
error is the mean over the tensors. Needs no labels; with labels, the drop of the task's metric is measured too.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field

from tersor.core.errors import InputError
from tersor.core.target import Target
from tersor.graph.eval_mode import evaluating
from tersor.graph.forward_call import run
from tersor.quantization.grid import Grid
from tersor.quantization.observers import WeightRange
from tersor.quantization.quantizers import Quantizers
from tersor.tasks.calibration_batch import read_batch
from tersor.tasks.classification import CLASSIFICATION
from tersor.tasks.network_outputs import floats_of_both, relative_squared_error_of_all
from tersor.tasks.task import Task


@dataclass(frozen=True)
class Cost:
    """The cost of quantizing the weight of one layer.

    Attributes:
        layer: name of the layer.
        bits: bit width of its weight.
        error: mean squared difference of the outputs from those in float, as a fraction of their mean square.
        drop: drop of the task's metric (accuracy in points), positive where it is worse; None if the images have no
            labels.
    """

    layer: str
    bits: int
    error: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    drop: float | None


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
        quantizers: of the network, all disabled; they stay disabled.
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
    exact = list(_runs(quantizers, data, task))
    _require_finite(exact)
    for layer, bits in candidates:
        with _quantized(quantizers, layer, bits):
            quantizers.set_weight_grid(layer, target, weight_range, percentile)
            found = _cost(_runs(quantizers, data, task), exact, task)
        yield Cost(layer, bits, *found)  # outside the `with`: the network is in float while the caller runs


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


@dataclass(frozen=True)
class _Run:
    """Outputs of the network for a batch; predictions and targets, where there are targets."""

    outputs: Any
    predictions: Any
    targets: Any


def _runs(quantizers: Quantizers, data: Iterable[Any], task: Task) -> Iterator[_Run]:
    graph = quantizers.graph
    device = next(graph.parameters()).device
    with evaluating(graph):
        for batch in data:
            found = read_batch(batch, task)
            with torch.inference_mode():
                outputs = run(graph, found.images.to(device))
                labelled = found.targets is not None and len(found.images)
                yield _Run(
                    outputs, task.predictions(outputs) if labelled else None, found.targets if labelled else None
                )


def _require_finite(runs: list[_Run]) -> None:
    floats = [each for run in runs for each, _ in floats_of_both(run.outputs, run.outputs)]
    if not sum(map(len, floats)):
        raise InputError("the data contains no images. Pass batches (N, C, H, W).")
    if not all(torch.isfinite(each).all() for each in floats):
        raise InputError(
            "the network's outputs are not finite for some images. Check images and weights for NaN, infinity and very "
            "large values."
        )


def _cost(quantized: Iterable[_Run], exact: list[_Run], task: Task) -> tuple[float, float | None]:
    """Relative error of the outputs, and drop of the metric."""
    labelled = all(run.targets is not None for run in exact)
    predictions: list[Any] = []

    def pairs() -> Iterator[tuple[Any, Any]]:
        for now, before in zip(quantized, exact, strict=True):
            predictions.append(now.predictions)
            yield now.outputs, before.outputs

    error = relative_squared_error_of_all(pairs())
    if not labelled:
        return error, None
    targets = [run.targets for run in exact]
    before, now = (
        task.score(zip(each, targets, strict=True)) for each in ([run.predictions for run in exact], predictions)
    )
    return error, before - now if task.higher_is_better else now - before
