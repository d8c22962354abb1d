"""Post-training quantization: a trained network on integer grids, from a few hundred images without labels.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR
2018; Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018 (arXiv 1806.08342).

    weights       (C_out, ...)    w_hat = s_c * clip(round(w / s_c), -(2^(b-1) - 1), 2^(b-1) - 1), one s for each c
    activations   (N, ...)        x_hat = s * (clip(round(x / s) + z, 0, 2^b - 1) - z), one s and z for the tensor

The papers differ on symmetric activations; here they are unsigned with a zero point, since ONNX Runtime fuses half of
a residual network only then. BatchNorm stays alive: folding it multiplies a channel's scale and leaves its integers
as they are (a negative gamma flips their sign), so export folds exactly. The paper's grid keeps -128; without it a
flipped sign stays on the grid.

On a processor that adds 8-bit products in 16 bits (AVX2 without VNNI) weights of a channel are kept from saturating:
see `core/ranges.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from tersor.core.affine import Grid, affine_parameters, symmetric_scale
from tersor.core.attachment import Attachment, Progress
from tersor.core.errors import InputError
from tersor.core.method import PLAIN_VALUES
from tersor.core.objective import images_of
from tersor.core.parametrization import FakeQuantize, shown_by
from tersor.core.ranges import Histogram, channel_maxima, least_squares_scale, without_saturation
from tersor.core.selection import Layer, weighted_layers, without
from tersor.core.target import Target
from tersor.graph.capture import capture
from tersor.graph.placement import place, quantizable

Range = Literal["minmax", "percentile", "mse"]


@dataclass(frozen=True, config=PLAIN_VALUES)
class PTQ:
    """Post-training quantization to integer grids; no training, no labels."""

    bits: Annotated[int, Field(ge=2, le=8, description="of a weight")] = 8
    activation_bits: Annotated[int, Field(ge=2, le=8, description="of an activation")] = 8
    weight_range: Annotated[Literal["minmax", "mse"], Field(description="how a channel's range is set")] = "minmax"
    activation_range: Annotated[Range, Field(description="how a tensor's range is set")] = "minmax"
    percentile: Annotated[
        float,
        Field(gt=50, le=100, description="of `activation_range: percentile`: percent of the values kept"),
    ] = 99.99
    calibration_images: Annotated[int, Field(ge=1, description="images looked at, without labels")] = 512
    exclude: Annotated[tuple[str, ...], Field(description="patterns of layers that stay in float")] = ()

    def attach(
        self,
        model: nn.Module,
        *,
        data: Iterable[Any] | None = None,
        teacher: nn.Module | None = None,
        steps: int = 0,
        target: Target | None = None,
    ) -> PTQAttachment:
        """Captures the network and lays quantizers on weights and edges; they round once `begin` has calibrated them.

        Raises:
            InputError: no data, a pattern of `exclude` that matches nothing, no layer left, a grid already there.
        """
        if data is None:
            raise InputError(
                "ptq needs images to calibrate with; none were given. Pass data=..., a few hundred suffice."
            )
        target = target or Target()
        graph = capture(model)
        if any(isinstance(module, FakeQuantize) for module in graph.modules()):
            raise InputError("the network is quantized already. Possible: one of ptq, qat in a recipe.")
        known = quantizable(graph)
        chosen = without(weighted_layers(graph), self.exclude)
        layers = {name: layer for name, layer in chosen.items() if name in known}
        if not layers:
            raise InputError("ptq found no convolution or fully connected layer to quantize.")
        activations = place(graph, layers, Grid.unsigned(self.activation_bits), target.runtime)
        for layer in layers.values():
            quantizer = FakeQuantize(Grid.signed(self.bits), channels=layer.weight.shape[0]).to(layer.weight.device)
            parametrize.register_parametrization(layer, "weight", quantizer)
        for name in activations:
            graph.get_submodule(name).to(next(graph.parameters()).device)
        return PTQAttachment(self, graph, tuple(layers), tuple(activations), data, target)


class PTQAttachment(Attachment):
    """Quantizers laid on a captured network; `begin` sets their ranges."""

    model: fx.GraphModule

    def __init__(
        self,
        method: PTQ,
        graph: fx.GraphModule,
        layers: tuple[str, ...],
        activations: tuple[str, ...],
        data: Iterable[Any],
        target: Target,
    ) -> None:
        super().__init__(graph)
        self.method = method
        self.layers = layers
        self.activations = activations
        self.data = data
        self.target = target

    def begin(self) -> Iterator[Progress]:
        """Calibrates: one or two passes over the images, then every range is set. Does nothing a second time.

        Raises:
            InputError: the data holds no image, or cannot be read twice where two passes are needed.
        """
        quantizers = {name: self._quantizer(name) for name in self.activations}
        if all(quantizer.ready for quantizer in quantizers.values()):
            return
        self.model.eval()
        histograms = {name: Histogram() for name in self.activations}
        yield from self._look_at_images(histograms)
        for name, quantizer in quantizers.items():
            quantizer.set_grid(*affine_parameters(*self._range(histograms[name], quantizer.grid), quantizer.grid))
        for name in self.layers:
            self._quantize_weight(self.model.get_submodule(name))

    def _look_at_images(self, histograms: dict[str, Histogram]) -> Iterator[Progress]:
        passes = ["widen"] if self.method.activation_range == "minmax" else ["widen", "count"]
        done = 0
        for number, each in enumerate(passes):
            before = done
            for images in self._images():
                self._observe({name: getattr(histograms[name], each) for name in self.activations}, images)
                done += len(images)
                yield Progress("calibration", done, len(passes) * self.method.calibration_images)
            if done == before:
                again = " when it read it again; a DataLoader or a list can be read twice" if number else ""
                raise InputError(f"ptq was given data without a single image{again}. Pass batches (N, C, H, W).")
            _refuse_what_is_not_finite(histograms)

    def _quantizer(self, name: str) -> FakeQuantize:
        quantizer = self.model.get_submodule(name)
        assert isinstance(quantizer, FakeQuantize)
        return quantizer

    def _images(self) -> Iterator[Tensor]:
        device = next(self.model.parameters()).device
        left = self.method.calibration_images
        for batch in self.data:
            images = images_of(batch)[:left]
            if not images.is_floating_point():
                raise InputError(f"a batch of the data is of {images.dtype}. Pass normalised images in floating point.")
            if len(images):
                yield images.to(device)
            left -= len(images)
            if left <= 0:
                return

    @torch.inference_mode()
    def _observe(self, watchers: dict[str, Callable[[Tensor], None]], images: Tensor) -> None:
        """Shows every quantizer's input to its watcher; a value that movers hand on is shown once."""
        seen: set[nn.Module] = set()

        def look(module: nn.Module, inputs: tuple[Tensor, ...], watch: Callable[[Tensor], None]) -> None:
            if module not in seen:
                seen.add(module)
                watch(inputs[0])

        hooks = [
            self._quantizer(name).register_forward_pre_hook(partial(look, watch=watch))
            for name, watch in watchers.items()
        ]
        try:
            self.model(images)
        finally:
            for hook in hooks:
                hook.remove()

    def _range(self, histogram: Histogram, grid: Grid) -> tuple[Tensor, Tensor]:
        match self.method.activation_range:
            case "minmax":
                return histogram.low, histogram.high
            case "percentile":
                return histogram.percentile(self.method.percentile)
            case "mse":
                return histogram.least_squares(grid)

    def _quantize_weight(self, layer: nn.Module) -> None:
        assert isinstance(layer, Layer)
        weight = layer.weight
        quantizer = next(each for each in shown_by(layer) if isinstance(each, FakeQuantize))
        if self.method.weight_range == "mse":
            scale = least_squares_scale(weight, quantizer.grid)
        else:
            scale = symmetric_scale(channel_maxima(weight), quantizer.grid)
        if self.target.cpu == "avx2":
            scale = without_saturation(weight, scale, quantizer.grid)
        quantizer.set_grid(scale)


def _refuse_what_is_not_finite(histograms: dict[str, Histogram]) -> None:
    for name, histogram in histograms.items():
        if not torch.isfinite(histogram.high - histogram.low):
            raise InputError(
                f"the calibration images give values that are not finite at {name.removeprefix('quantizers.')}. "
                "Possible: images and weights without NaN or infinity."
            )
