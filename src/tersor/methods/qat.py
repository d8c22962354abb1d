"""Quantization-aware training: a network trains while it is seen on the integer grids that it will run on.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR
2018; the straight-through gradient is of Bengio, Leonard, Courville, 2013 (arXiv 1308.3432).

    weights       (C_out, ...)   w_hat = s_c * clip(round(w / s_c), -n, n),  n = 2^(b-1) - 1,  s_c = max|w_c| / n
    activations   (N, ...)       x_hat = s * (clip(round(x / s) + z, 0, 2^b - 1) - z),  s and z over [low, high]
    ranges        scalars        low and high are running means of each batch's minimum and maximum
    gradient                     dL/dx = dL/dx_hat inside the range, 0 outside

It starts from post-training quantization: from the grids of a stage before, or from ranges of its own that one pass
over a few hundred images gives. The scales of the weights follow the weights after every step, and the grids of a stage
before go on to span the share of max|w_c| that they spanned there. At the end the ranges stay as they are, and what was
trained with is what is exported.

The paper simulates the folding of BatchNorm with the batch's statistics, and leaves activations in float for the first
steps of a training from scratch. Here BatchNorm stays alive, since it folds into the scale of a channel and leaves the
integers as they are; and the network is trained already, so that all is rounded from the first step. With
`freeze_norm_at: 0` it trains as if BatchNorm were folded with the statistics that it came with.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from tersor.graph.batchnorm import FrozenAt
from tersor.graph.parametrization import parametrization_input
from tersor.quantization.calibration import calibrate
from tersor.quantization.fake_quantize import EMAFakeQuantize, FakeQuantize, WeightTrackingFakeQuantize
from tersor.quantization.integer_coverage import calibrated_coverage
from tersor.quantization.precision import (
    ActivationBitsThatLie,
    CalibrationImages,
    EndsBitsThatLie,
    Exclude,
    InheritedWeightBits,
    PerChannelThatLie,
)
from tersor.quantization.quantizers import Quantizers, insert_or_reuse_quantizers, notes
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.method import PLAIN_VALUES


@dataclass(frozen=True, config=PLAIN_VALUES)
class QAT:
    """Training on integer grids, by the straight-through gradient."""

    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"bits": 4, "averaging": 0.3, "freeze_norm_at": 0.5, "freeze_ranges_at": 0.7}
    exempt: ClassVar[dict[str, str]] = {"off": "a grid rounds, the finest of 8 bits too"}

    bits: InheritedWeightBits = None
    activation_bits: ActivationBitsThatLie = None
    first_last_bits: EndsBitsThatLie = None
    per_channel: PerChannelThatLie = None
    averaging: Annotated[float, Field(gt=0, le=1, description="what a batch weighs in a running range")] = 0.1
    freeze_ranges_at: Annotated[
        float, Field(gt=0, le=1, description="fraction of the stage after which ranges of activations stay")
    ] = 1.0
    freeze_norm_at: Annotated[
        float, Field(ge=0, le=1, description="fraction of the stage after which BatchNorm's statistics stay")
    ] = 1.0
    calibration_images: CalibrationImages = 512
    exclude: Exclude = ()

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Captures the network and lays quantizers on weights and edges, or takes over those that lie.

        Raises:
            InputError: no data, a pattern of `exclude` that matches nothing, no layer left, grids of other bits.
        """
        quantizers = insert_or_reuse_quantizers(
            model,
            bits=self.bits,
            activation_bits=self.activation_bits,
            first_last_bits=self.first_last_bits,
            per_channel=self.per_channel,
            exclude=self.exclude,
            data=context.data,
            target=context.target,
            method="qat",
        )
        for name in quantizers.layers:
            quantizers.replace_on_weight(name, _following(quantizers.of_weight(name)))
        for name in quantizers.activations:
            _let_move(quantizers.graph, name, self.averaging)
        return QATAttachment(self, quantizers, context)


class QATAttachment(Attachment):
    """Quantizers that move with what they are shown."""

    def __init__(
        self,
        method: QAT,
        quantizers: Quantizers,
        context: AttachContext,
    ) -> None:
        super().__init__(quantizers.graph, notes=notes(quantizers, context.target))
        self.method = method
        self.quantizers = quantizers
        self.context = context
        self._norms = FrozenAt(quantizers.graph, method.freeze_norm_at, context.steps)
        self._ranges_stay_after = round(method.freeze_ranges_at * context.steps)

    def begin(self) -> None:
        """One pass over the images for the first ranges; nothing where a stage before has set them.

        Raises:
            InputError: the data holds no image.
        """
        self._freeze(0)
        if self.quantizers.enabled:
            for edge in filter(lambda each: each.enabled, self._edges()):  # others belong to layers left in float
                low, high = ((end - edge.zero_point) * edge.scale for end in (edge.grid.minimum, edge.grid.maximum))
                edge.set_range(low, high)
            for quantizer, weight in self._weights(self.quantizers.rounding).values():
                quantizer.start(weight)
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
        """The scales of the weights follow them."""
        self._follow_weights(self.quantizers.rounding)
        self._freeze(step + 1)

    def finish(self) -> None:
        """Ranges stay as they are from now on."""
        self._follow_weights(self.quantizers.rounding)  # a running mean of the weights may have taken their place
        for edge in self._edges():
            edge.moves = False

    def _freeze(self, done: int) -> None:
        """What is to stay from now on, after so many steps."""
        self._norms.done(done)
        for edge in self._edges() if done == self._ranges_stay_after else ():
            edge.moves = False

    def _follow_weights(self, quantizers: Quantizers) -> None:
        for name, (quantizer, weight) in self._weights(quantizers).items():
            quantizer.follow(weight)
            quantizers.limit_for_avx2_saturation(name, self.context.target)

    def _weights(self, quantizers: Quantizers) -> dict[str, tuple[WeightTrackingFakeQuantize, Tensor]]:
        """Of every layer the quantizer of its weight, and what that is shown."""
        found: dict[str, tuple[WeightTrackingFakeQuantize, Tensor]] = {}
        for name in quantizers.layers:
            quantizer = quantizers.of_weight(name)
            assert isinstance(quantizer, WeightTrackingFakeQuantize)
            found[name] = quantizer, parametrization_input(quantizers.graph.get_submodule(name), quantizer)
        return found

    def _edges(self) -> list[EMAFakeQuantize]:
        edges = [self.quantizers.graph.get_submodule(name) for name in self.quantizers.activations]
        return [edge for edge in edges if isinstance(edge, EMAFakeQuantize)]


def _following(still: FakeQuantize) -> WeightTrackingFakeQuantize:
    """One whose grid follows the weight, from where another's is."""
    following = WeightTrackingFakeQuantize(still.grid, len(still.scale) if still.scale.ndim else None)
    if still.enabled:
        following.set_grid(still.scale, still.zero_point)
    return following.to(still.scale.device)


def _let_move(graph: fx.GraphModule, name: str, averaging: float) -> None:
    """Puts a quantizer whose range moves in the place of one whose range does not."""
    still = graph.get_submodule(name)
    assert isinstance(still, FakeQuantize)
    moving = EMAFakeQuantize(still.grid, averaging).to(still.scale.device)
    if still.enabled:
        moving.set_grid(still.scale, still.zero_point)
    graph.set_submodule(name, moving)
