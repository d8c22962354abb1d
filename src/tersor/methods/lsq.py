"""Learned step size quantization: the steps of the grids are trained with the weights, by the same loss.

Esser et al., "Learned Step Size Quantization", ICLR 2020; Bhalgat et al., "LSQ+: Improving low-bit quantization through
learnable offsets and better initialization", CVPR Workshops 2020.

    weights       (C_out, ...)    w_hat = s_c * clip(round(w / s_c), -n, n),  n = 2^(b-1) - 1
    activations   (N, ...)        x_hat = s * (clip(round(x / s) + z, 0, p) - z),  p = 2^b - 1
    gradient of s                 round(x / s) - x / s inside the range, its end outside; times 1 / sqrt(N p)
    at the start                  s = 2 mean|w_c| / sqrt(n) for a weight

The paper has one step for a layer's weights, and the point -2^(b-1) too; here each channel has a step by default
(`per_channel: false` is the paper's), and where a stage before has laid grids, learning starts there. Its activations
are positive and start like weights; here they may be negative, have a zero point, and start from the range with the
smallest squared error, as in LSQ+. `offset: true` learns that zero point. N is the number of weights that share a step,
and that of one image's activations, as in the paper; the code in circulation counts the whole batch's.

First and last layer have 8 bits, as in the paper. At the end the steps become plain numbers: what was learned is what
is exported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.graph.batchnorm import FrozenAt
from tersor.graph.parametrization import parametrization_input
from tersor.quantization.calibration import calibrate
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid
from tersor.quantization.integer_coverage import calibrated_coverage
from tersor.quantization.learned_step import LearnedFakeQuantize
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


def first_step(weight: Tensor, grid: Grid, *, per_channel: bool = True) -> Tensor:
    """Where a step starts, 2 mean|w| / sqrt(n): (C, ...) -> (C,), or () where all channels share it."""
    size = weight.detach().float().abs()
    mean = size.flatten(1).mean(1) if per_channel else size.mean()
    return torch.where(mean > 0, 2 * mean / grid.maximum**0.5, torch.ones_like(mean))


@dataclass(frozen=True, config=PLAIN_VALUES)
class LSQ:
    """Training on integer grids whose steps are learned."""

    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"bits": 3, "offset": True, "freeze_norm_at": 0.5}
    exempt: ClassVar[dict[str, str]] = {"off": "a grid rounds, the finest of 8 bits too"}

    bits: InheritedWeightBits = None
    activation_bits: ActivationBitsThatLie = None
    first_last_bits: EndsBitsThatLie = None
    per_channel: PerChannelThatLie = None
    offset: Annotated[bool, Field(description="learn the activations' zero points too, as LSQ+ does")] = False
    freeze_norm_at: Annotated[
        float, Field(ge=0, le=1, description="fraction of the stage after which BatchNorm's statistics stay")
    ] = 1.0
    calibration_images: CalibrationImages = 512
    exclude: Exclude = ()

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Captures the network and lays quantizers on weights and edges, or lets those that lie learn.

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
            method="lsq",
        )
        for name in quantizers.layers:
            quantizers.replace_on_weight(name, _learned(quantizers.of_weight(name)))
        for name in quantizers.activations:
            learned = _learned(quantizers.of_activation(name), offset=self.offset, of_images=True)
            quantizers.graph.set_submodule(name, learned)
        return LSQAttachment(self, quantizers, context)


class LSQAttachment(Attachment):
    """Quantizers whose steps learn."""

    def __init__(
        self,
        method: LSQ,
        quantizers: Quantizers,
        context: AttachContext,
    ) -> None:
        super().__init__(quantizers.graph, notes=notes(quantizers, context.target))
        self.method = method
        self.quantizers = quantizers
        self.context = context
        self._norms = FrozenAt(quantizers.graph, method.freeze_norm_at, context.steps)

    def begin(self) -> None:
        """Two passes over the images for the activations' first ranges; nothing where a stage before has set them.

        Raises:
            InputError: the data holds no image, or cannot be read twice.
        """
        self._norms.done(0)
        if self.quantizers.enabled:
            return
        assert self.context.data is not None
        histograms = calibrate(
            self.quantizers,
            self.context.data,
            images=self.method.calibration_images,
            passes=2,
            method="lsq",
            progress=self.context.progress,
        )
        self.quantizers.set_activation_grids(histograms, "mse")
        for name in self.quantizers.layers:
            quantizer = self.quantizers.of_weight(name)
            weight = parametrization_input(self.quantizers.graph.get_submodule(name), quantizer)
            quantizer.set_grid(first_step(weight, quantizer.grid, per_channel=bool(quantizer.scale.ndim)))
            self.quantizers.limit_for_avx2_saturation(name, self.context.target)
        self.notes += calibrated_coverage(self.model).notes

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Steps stay above zero, zero points follow their offsets."""
        for each in self._learning():
            each.follow()
        for name in self.quantizers.layers:
            self.quantizers.limit_for_avx2_saturation(name, self.context.target)
        self._norms.done(step + 1)

    def finish(self) -> None:
        """The steps become plain numbers."""
        for name in self.quantizers.layers:
            self.quantizers.replace_on_weight(name, _settled(self.quantizers.of_weight(name)))
        for name in self.quantizers.activations:
            self.quantizers.graph.set_submodule(name, _settled(self.quantizers.of_activation(name)))

    def _learning(self) -> Iterator[LearnedFakeQuantize]:
        return (cast("LearnedFakeQuantize", each) for each in self.quantizers.all())


def _learned(still: FakeQuantize, *, offset: bool = False, of_images: bool = False) -> LearnedFakeQuantize:
    """One whose step learns, from where another's is."""
    channels = len(still.scale) if still.scale.ndim else None
    learned = LearnedFakeQuantize(still.grid, channels, offset=offset, of_images=of_images).to(still.scale.device)
    if still.enabled:
        learned.set_grid(still.scale, still.zero_point)
    return learned


def _settled(learned: FakeQuantize) -> FakeQuantize:
    """One whose step stays as it was learned, if it rounds."""
    channels = len(learned.scale) if learned.scale.ndim else None
    still = FakeQuantize(learned.grid, channels).to(learned.scale.device)
    if learned.enabled:
        still.set_grid(learned.scale.detach(), learned.zero_point)
    return still
