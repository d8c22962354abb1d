"""What a layer costs on so many bits: its weight alone is rounded, all else stays in float.

    error(l, b) = sum over images of |y_lb - y|^2 / sum over images of |y|^2         y, y_lb: logits (N, classes)

y is what the network answers in float, y_lb with the weight of layer l on b bits. No labels are needed; where there
are some, the points of accuracy that are lost are told too.
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
    """What it costs to round the weight of one layer.

    Attributes:
        layer: its name.
        bits: of its weight.
        error: mean squared difference of the logits from those in float, as a fraction of their mean square.
        drop: points of accuracy that are lost; None where the images have no labels.
    """

    layer: str
    bits: int
    error: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    drop: float | None


def sensitivity(
    quantizers: Quantizers,
    data: Iterable[Any],
    asked: Iterable[tuple[str, int]],
    *,
    target: Target,
    weight_range: WeightRange = "mse",
    percentile: float = 99.99,
) -> Iterator[Cost]:
    """Measures one layer on one width after the other, each when it is asked for. The network is left in float.

    Args:
        quantizers: on the network, none of which rounds yet.
        data: batches of images (N, C, H, W), with labels or without; the same at every iteration.
        asked: layers and bits.
        target: the processor that the network is made for.
        weight_range: how a weight's range is set.
        percentile: of a range of that name: percent of the values kept.

    Raises:
        InputError: the data holds no image; the network answers with numbers that are not finite.
    """
    assert not quantizers.enabled, "all else is in float"
    exact = list(_answers(quantizers, data))
    _refuse_what_cannot_be_compared([logits for logits, _ in exact])
    for layer, bits in asked:
        with _rounded(quantizers, layer, bits):
            quantizers.set_weight_grid(layer, target, weight_range, percentile)
            found = [logits for logits, _ in _answers(quantizers, data)]
        yield Cost(layer, bits, *_compared(found, exact))  # in float, whatever the caller does meanwhile


@contextmanager
def _rounded(quantizers: Quantizers, layer: str, bits: int) -> Generator[None]:
    """One layer's weight on another grid; afterwards its quantizer is as it was, but for a scale that is not shown."""
    quantizer = quantizers.of_weight(layer)
    before = quantizer.grid
    quantizer.grid = Grid.signed(bits)
    try:
        yield
    finally:
        quantizer.grid, quantizer.enabled = before, False


def _answers(quantizers: Quantizers, data: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Logits (N, classes) and labels (N,) of each batch."""
    graph = quantizers.graph
    device = next(graph.parameters()).device
    with evaluating(graph):
        for batch in data:
            with torch.inference_mode():
                logits = graph(images_of(batch).to(device))
            yield logits, labels_of(batch)


def _refuse_what_cannot_be_compared(logits: list[Tensor]) -> None:
    if not sum(map(len, logits)):
        raise InputError("sensitivity was given data without a single image. Pass batches (N, C, H, W).")
    if not all(torch.isfinite(batch).all() for batch in logits):
        raise InputError(
            "the network answers some of the images with numbers that are not finite. Possible: images and weights "
            "without NaN or infinity."
        )


def _compared(found: list[Tensor], exact: list[tuple[Tensor, Tensor | None]]) -> tuple[float, float | None]:
    """Relative error of the logits, and points of accuracy lost."""
    wrong = whole = 0.0
    images = lost = 0
    labelled = True
    for now, (before, labels) in zip(found, exact, strict=True):
        wrong += float((now - before).double().square().sum())
        whole += float(before.double().square().sum())
        images += len(now)
        if labels is None:
            labelled = False
        else:
            truth = labels.to(now.device)
            lost += int((before.argmax(1) == truth).sum() - (now.argmax(1) == truth).sum())
    return wrong / max(whole, torch.finfo(torch.float32).tiny), 100 * lost / images if labelled else None
