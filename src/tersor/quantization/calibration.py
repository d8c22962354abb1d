"""Showing a network images, to see what range every activation has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.core.progress import NO_PROGRESS, ProgressReporter
from tersor.core.target import Target
from tersor.graph.batchnorm import Norm
from tersor.graph.batchnorm_behind import record_ranks
from tersor.graph.comparison import FEW, require_same
from tersor.graph.eval_mode import checked_forward, first_images
from tersor.quantization.integer_coverage import IMAGE_SHAPE
from tersor.quantization.observers import Histogram
from tersor.quantization.options import Ranges
from tersor.quantization.quantizers import Quantizers


def calibrate(
    quantizers: Quantizers,
    data: Iterable[Any],
    *,
    images: int,
    passes: int,
    method: str,
    progress: ProgressReporter = NO_PROGRESS,
) -> dict[str, Histogram]:
    """Shows the network `images` of `data`, once for the ranges of its activations, twice for how often each value is.

    Args:
        quantizers: on the network, none of which rounds yet.
        data: batches of images, with or without labels.
        images: how many to look at.
        passes: 1 or 2.
        method: its name, for error messages.
        progress: reports the images.

    Returns:
        A histogram for each of the activations.

    Raises:
        InputError: the data holds no image, or cannot be read again; values are not finite; the captured network
            computes something else than the original.
    """
    _refuse_weights_that_are_not_finite(quantizers.graph)
    histograms = {name: Histogram() for name in quantizers.activations}
    quantizers.graph.eval()
    done = 0
    progress.start("calibration", passes * images)
    for number, look in enumerate((Histogram.widen, Histogram.count)[:passes]):
        before = done
        for batch in first_images(data, images, next(quantizers.graph.parameters()).device):
            _observe(quantizers, {name: partial(look, histogram) for name, histogram in histograms.items()}, batch)
            if not done:
                _compare(quantizers, batch[:FEW])
            done += len(batch)
            quantizers.graph.meta[IMAGE_SHAPE] = tuple(batch.shape[1:])
            progress.advance(len(batch))
        if done == before:
            again = " when it read it again; a DataLoader or a list can be read twice" if number else ""
            raise InputError(f"{method} was given data without a single image{again}. Pass batches (N, C, H, W).")
        _refuse_what_is_not_finite(histograms)
    return histograms


def set_ranges(
    quantizers: Quantizers,
    data: Iterable[Any],
    ranges: Ranges,
    *,
    target: Target,
    method: str,
    progress: ProgressReporter = NO_PROGRESS,
) -> None:
    """Calibrates, and sets the grids of all activations and weights.

    Raises:
        InputError: the data holds no image, or cannot be read again; values are not finite.
    """
    passes = 1 if ranges.activations == "minmax" else 2
    images = ranges.images
    histograms = calibrate(quantizers, data, images=images, passes=passes, method=method, progress=progress)
    quantizers.set_activation_grids(histograms, ranges.activations, ranges.percentile)
    for name in quantizers.layers:
        quantizers.set_weight_grid(name, target, ranges.weights, ranges.percentile)


@torch.inference_mode()
def _observe(quantizers: Quantizers, watchers: dict[str, Callable[[Tensor], None]], images: Tensor) -> None:
    """Shows every quantizer's input to its watcher; a value that movers hand on is shown once."""
    seen: set[nn.Module] = set()

    def look(module: nn.Module, inputs: tuple[Tensor, ...], watch: Callable[[Tensor], None]) -> None:
        if module not in seen:
            seen.add(module)
            watch(inputs[0])

    hooks = [
        quantizers.of_activation(name).register_forward_pre_hook(partial(look, watch=watch))
        for name, watch in watchers.items()
    ]
    try:
        with checked_forward(type(quantizers.graph).__name__, images, captured=True):
            quantizers.graph(images)
    finally:
        for hook in hooks:
            hook.remove()


def _compare(quantizers: Quantizers, images: Tensor) -> None:
    """The captured network with quantizers that do not round yet, with the original; and what folding needs to know."""
    if quantizers.original is not None and not quantizers.enabled:
        require_same(quantizers.graph, quantizers.original, images)
    record_ranks(quantizers.graph, images)


def _refuse_weights_that_are_not_finite(model: nn.Module) -> None:
    """Of the last layer's no activation would tell; an infinite variance silences a channel."""
    statistics = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if isinstance(module, Norm)
        for key, value in module.named_buffers(recurse=False)
    }
    for name, value in {**dict(model.named_parameters()), **statistics}.items():
        if not torch.isfinite(value).all():
            told = name.replace("parametrizations.", "").removesuffix(".original")
            raise InputError(f"{told} has values that are not finite. Possible: a network without NaN or infinity.")


def _refuse_what_is_not_finite(histograms: dict[str, Histogram]) -> None:
    for name, histogram in histograms.items():
        if not torch.isfinite(histogram.high - histogram.low):
            raise InputError(
                f"the calibration images give values that are not finite at {name.removeprefix('quantizers.')}. "
                "Possible: images and weights without NaN or infinity."
            )
