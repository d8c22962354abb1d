"""Calibration: runs a network on images to measure the range of every activation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.core.progress import NO_PROGRESS, ProgressReporter
from tersor.core.target import Target
from tersor.data import Batches
from tersor.data.network_inputs import NetworkInput
from tersor.graph.batchnorm import Norm
from tersor.graph.eval_mode import checked_forward, first_images
from tersor.graph.forward_call import run
from tersor.quantization.observers import Histogram
from tersor.quantization.product_error import without_inaccurate_products
from tersor.quantization.quantizer_options import Ranges
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
    """Run the network on `images` of `data`: one pass for the ranges of its activations, a second for histograms.

    Args:
        quantizers: quantizers of the network, all disabled.
        data: batches of images, with or without labels.
        images: number of images.
        passes: 1 or 2.
        method: the method's name, for error messages.
        progress: reports the number of images.

    Returns:
        A histogram per activation.

    Raises:
        InputError: the data contains no image, or cannot be read again; a value is not finite.
    """
    _require_finite_weights(quantizers.graph)
    histograms = {name: Histogram() for name in quantizers.activations}
    quantizers.graph.eval()
    done = 0
    available = len(data.images) if isinstance(data, Batches) else images
    progress.start("calibration", passes * min(images, available))
    for number, record in enumerate((Histogram.widen, Histogram.count)[:passes]):
        before = done
        for batch in first_images(data, images, next(quantizers.graph.parameters()).device):
            _observe(quantizers, {name: partial(record, histogram) for name, histogram in histograms.items()}, batch)
            done += len(batch)
            progress.advance(len(batch))
        if done == before:
            if number:
                raise InputError(
                    f"{method} reads the data twice, but the data cannot be read again. Pass a DataLoader or a list."
                )
            raise InputError(f"{method} needs images, and the data contains none. Pass batches (N, C, H, W).")
        _require_finite_ranges(histograms)
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
    """Calibrate, and set the grids of all activations and weights. Products with a large error stay in float.

    Raises:
        InputError: the data contains no image, or cannot be read again; a value is not finite.
    """
    passes = 1 if ranges.activations == "minmax" else 2
    images = ranges.images
    histograms = calibrate(quantizers, data, images=images, passes=passes, method=method, progress=progress)
    quantizers.set_activation_grids(histograms, ranges.activations, ranges.percentile)
    for name in quantizers.layers:
        quantizers.set_weight_grid(name, target, ranges.weights, ranges.percentile)
    without_inaccurate_products(quantizers, data, target)


@torch.inference_mode()
def _observe(quantizers: Quantizers, recorders: dict[str, Callable[[Tensor], None]], images: NetworkInput) -> None:
    """Records the input of every quantizer; one that is called again with moved values records the first call."""
    seen: set[nn.Module] = set()

    def record(module: nn.Module, inputs: tuple[Tensor, ...], recorder: Callable[[Tensor], None]) -> None:
        if module not in seen:
            seen.add(module)
            recorder(inputs[0])

    hooks = [
        quantizers.of_activation(name).register_forward_pre_hook(partial(record, recorder=recorder))
        for name, recorder in recorders.items()
    ]
    try:
        with checked_forward(type(quantizers.graph).__name__, images, captured=True):
            run(quantizers.graph, images)
    finally:
        for hook in hooks:
            hook.remove()


def _require_finite_weights(model: nn.Module) -> None:
    """Activations do not show these: nothing follows the last layer, and an infinite variance zeroes a channel."""
    statistics = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if isinstance(module, Norm)
        for key, value in module.named_buffers(recurse=False)
    }
    for name, value in {**dict(model.named_parameters()), **statistics}.items():
        if not torch.isfinite(value).all():
            shown = name.replace("parametrizations.", "").removesuffix(".original")
            raise InputError(f"{shown} has values that are not finite (NaN or infinity). Load other weights.")


def _require_finite_ranges(histograms: dict[str, Histogram]) -> None:
    for name, histogram in histograms.items():
        if not torch.isfinite(histogram.high - histogram.low):
            raise InputError(
                f"the calibration images lead to values that are not finite at {name.removeprefix('quantizers.')}. "
                "Check images and weights for NaN, infinity and very large values."
            )
