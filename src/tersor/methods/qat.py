"""Quantization-aware training: trains with fake-quantized weights and activations.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR
2018; the straight-through gradient: Bengio, Leonard, Courville, 2013 (arXiv 1308.3432).

    weights       (C_out, ...)   w_hat = s_c * clip(round(w / s_c), -n, n),  n = 2^(b-1) - 1,  s_c = max|w_c| / n
    activations   (N, ...)       x_hat = s * (clip(round(x / s) + z, 0, 2^b - 1) - z),  s and z over [low, high]
    ranges        scalars        low and high are running means of each batch's minimum and maximum
    gradient                     dL/dx = dL/dx_hat inside the range, 0 outside

It starts from post-training quantization: from the grids of an earlier stage, or from ranges calibrated in one pass
over a few hundred images. After every step the scales follow the weights; grids of an earlier stage keep their
initial range relative to max|w_c|. The final ranges are exported as they were trained.

The paper simulates BatchNorm folding with batch statistics, and leaves activations in float for the first steps when it
trains from scratch. Here BatchNorm stays in the graph, because it folds into a channel's scale and leaves the integers
unchanged; and since the network is already trained, everything is quantized from the first step. `freeze_norm_at: 0`
trains as if BatchNorm were folded with its initial statistics.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.core.plain_values import plain_dataclass
from tersor.graph.batchnorm import FrozenAt
from tersor.graph.parametrization import parametrization_input
from tersor.quantization.calibration import calibrate
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.integer_coverage import calibrated_coverage
from tersor.quantization.quantizer_options import QuantizedTrainingOptions
from tersor.quantization.quantizers import Quantizers, insert_or_reuse_quantizers, notes
from tersor.quantization.range_tracking import MovingAverage
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext, require_steps
from tersor.training.method import PLAIN_VALUES


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class QAT(QuantizedTrainingOptions):
    """Quantization-aware training with the straight-through gradient and running activation ranges."""

    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"bits": 4, "averaging": 0.3, "freeze_norm_at": 0.5, "freeze_ranges_at": 0.7}
    exempt: ClassVar[dict[str, str]] = {"off": "rounding changes the network even at 8 bits"}

    averaging: Annotated[
        float, Field(gt=0, le=1, description="weight of a batch in the running range of an activation")
    ] = 0.1
    freeze_ranges_at: Annotated[
        float, Field(gt=0, le=1, description="fraction of the stage after which activation ranges are frozen")
    ] = 1.0

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Captures the network and inserts quantizers, or reuses those of an earlier stage.

        Raises:
            InputError: no steps, no data, an `exclude` pattern that matches nothing, no layer left, options that
                contradict an earlier stage.
        """
        require_steps(context, "qat")
        quantizers = insert_or_reuse_quantizers(model, self, data=context.data, target=context.target, method="qat")
        for name in quantizers.layers:
            quantizers.of_weight(name).track_weight()
        for name in quantizers.activations:
            quantizers.of_activation(name).track_activations(self.averaging)
        return QATAttachment(self, quantizers, context)


class QATAttachment(Attachment):
    """Quantizers whose grids follow weights and activations."""

    scheduled_steps = 1

    def __init__(self, method: QAT, quantizers: Quantizers, context: AttachContext) -> None:
        super().__init__(quantizers.graph, notes=notes(quantizers, context.target))
        self.method = method
        self.quantizers = quantizers
        self.context = context
        self._norms = FrozenAt(quantizers.graph, method.freeze_norm_at, context.steps)
        self._freeze_ranges_after = round(method.freeze_ranges_at * context.steps)

    def begin(self) -> None:
        """Calibrates the first ranges in one pass over the images, or starts from the grids of an earlier stage.

        Raises:
            InputError: the data contains no image.
        """
        self._freeze(0)
        if self.quantizers.enabled:
            for edge in filter(lambda each: each.enabled, self._edges()):  # the others belong to layers left in float
                low, high = ((end - edge.zero_point) * edge.scale for end in (edge.grid.minimum, edge.grid.maximum))
                edge.set_range(low, high)
            for quantizer, weight in self._weights(self.quantizers.rounding).values():
                quantizer.measure_share(weight)
            return
        assert self.context.data is not None
        histograms = calibrate(
            self.quantizers,
            self.context.data,
            images=self.method.calibration_images,
            passes=1,
            method="qat",
            progress=self.context.progress,
        )
        for edge, histogram in zip(self._edges(), histograms.values(), strict=True):
            edge.set_range(histogram.low, histogram.high)
        self._follow_weights(self.quantizers)
        self.notes += calibrated_coverage(self.model).notes

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Updates the scales of the weights, and freezes what is due."""
        self._follow_weights(self.quantizers.rounding)
        self._freeze(step + 1)

    def finish(self) -> None:
        """Freezes all ranges.

        Warns:
            CompressionWarning: no optimizer step was taken.
        """
        super().finish()
        self._follow_weights(self.quantizers.rounding)  # which may have been replaced by their running mean
        self._freeze_ranges()

    def _freeze(self, done: int) -> None:
        """Freezes what is due after `done` steps."""
        self._norms.done(done)
        if done == self._freeze_ranges_after:
            self._freeze_ranges()

    def _freeze_ranges(self) -> None:
        for edge in self._edges():
            assert isinstance(edge.observer, MovingAverage)
            edge.observer.active = False

    def _follow_weights(self, quantizers: Quantizers) -> None:
        for name, (quantizer, weight) in self._weights(quantizers).items():
            quantizer.follow_weight(weight)
            quantizers.limit_for_avx2_saturation(name, self.context.target)

    def _weights(self, quantizers: Quantizers) -> dict[str, tuple[FakeQuantize, Tensor]]:
        """Layer -> the quantizer of its weight, and that quantizer's input."""
        of_weights = {name: quantizers.of_weight(name) for name in quantizers.layers}
        layers = {name: quantizers.graph.get_submodule(name) for name in of_weights}
        return {name: (each, parametrization_input(layers[name], each)) for name, each in of_weights.items()}

    def _edges(self) -> list[FakeQuantize]:
        return [self.quantizers.of_activation(name) for name in self.quantizers.activations]
