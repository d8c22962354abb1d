"""Sensitivity: the output error when the weight of a single layer is quantized and all else stays in float.

    error(l, b) = sum over images of |y_lb - y|^2 / sum over images of |y|^2         y, y_lb: logits (N, classes)

y are the network's logits in float, y_lb those with the weight of layer l at b bits. Needs no labels; with labels, the
loss of accuracy is measured too.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.target import Target
from tersor.data.batch import images_of, labels_of
from tersor.graph.eval_mode import evaluating
from tersor.quantization.grid import Grid
from tersor.quantization.observers import WeightRange
from tersor.quantization.quantizers import Quantizers


@dataclass(frozen=True)
class Cost:
    """The cost of quantizing the weight of one layer.

    Attributes:
        layer: name of the layer.
        bits: bit width of its weight.
        error: mean squared difference of the logits from those in float, as a fraction of their mean square.
        drop: loss of accuracy in points; None if the images have no labels.
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
) -> Iterator[Cost]:
    """Measure the cost of each layer and width, one at a time, when the iterator reaches it.

    Args:
        quantizers: of the network, all disabled; they stay disabled.
        data: batches of images (N, C, H, W), with labels or without; every iteration yields the same.
        candidates: names of layers, and bits.
        target: processor that the network is compressed for.
        weight_range: how a weight's range is chosen.
        percentile: percent of the values inside the range, for `weight_range: percentile`.

    Raises:
        InputError: the data contains no image, or a logit is not finite.
    """
    assert not quantizers.enabled
    exact = list(_logits_and_labels(quantizers, data))
    _require_finite([logits for logits, _ in exact])
    for layer, bits in candidates:
        with _quantized(quantizers, layer, bits):
            quantizers.set_weight_grid(layer, target, weight_range, percentile)
            quantized = [logits for logits, _ in _logits_and_labels(quantizers, data)]
        yield Cost(
            layer, bits, *_cost(quantized, exact)
        )  # outside the `with`: the network is in float while the caller runs


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


def _logits_and_labels(quantizers: Quantizers, data: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Logits (N, classes) and labels (N,) of each batch."""
    graph = quantizers.graph
    device = next(graph.parameters()).device
    with evaluating(graph):
        for batch in data:
            with torch.inference_mode():
                logits = graph(images_of(batch).to(device))
            yield logits, labels_of(batch)


def _require_finite(logits: list[Tensor]) -> None:
    if not sum(map(len, logits)):
        raise InputError("sensitivity found no image in the data. Pass batches (N, C, H, W).")
    if not all(torch.isfinite(batch).all() for batch in logits):
        raise InputError(
            "the network's logits are not finite for some images. Check images and weights for NaN, infinity and very "
            "large values."
        )


def _cost(quantized: list[Tensor], exact: list[tuple[Tensor, Tensor | None]]) -> tuple[float, float | None]:
    """Relative error of the logits, and loss of accuracy in points."""
    wrong = whole = 0.0
    images = lost = 0
    labelled = True
    for now, (before, labels) in zip(quantized, exact, strict=True):
        wrong += float((now - before).double().square().sum())
        whole += float(before.double().square().sum())
        images += len(now)
        if labels is None:
            labelled = False
        else:
            truth = labels.to(now.device)
            lost += int((before.argmax(1) == truth).sum() - (now.argmax(1) == truth).sum())
    return wrong / max(whole, torch.finfo(torch.float32).tiny), 100 * lost / images if labelled else None
