"""AdaRound: whether a weight is rounded up or down is learned, so that its layer answers as before.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020 (arXiv 2004.10568).

    weights       (C_out, ...)    w_hat = s_c * (clip(floor(w / s_c) + h(v), -n, n)),  h(v) in [0, 1] learned
    loss          of each layer   |f(W x) - f(W_hat x_hat)|^2 + lambda sum(1 - |2 h(v) - 1|^beta)

f is the layer's BatchNorm and activation, x its input in float, x_hat what reaches it from layers that are rounded
already: a few hundred images, no labels. `quantization/reconstruction.py` has the formulas.

The paper folds BatchNorm first; here it stays behind the layer, which gives every channel the same choice. It learns
for 10,000 iterations; here 1,000 of ten times the rate are the default. Activations are rounded when all weights are.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from tersor.quantization.calibration import Ranges
from tersor.quantization.observers import Range, WeightRange
from tersor.quantization.precision import (
    ActivationBits,
    EndsBits,
    Exclude,
    Percentile,
    PerChannel,
    Precision,
    WeightBits,
)
from tersor.quantization.reconstruction import Reconstruction
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.method import PLAIN_VALUES
from tersor.training.reconstruction_attachment import ReconstructionAttachment


@dataclass(frozen=True, config=PLAIN_VALUES)
class AdaRound:
    """Post-training quantization whose rounding is learned, layer by layer; no labels."""

    example: ClassVar[dict[str, Any]] = {"bits": 3, "iterations": 20}
    exempt: ClassVar[dict[str, str]] = {"off": "a grid rounds, the finest of 8 bits too"}

    bits: WeightBits = 4
    activation_bits: ActivationBits = 8
    first_last_bits: EndsBits = 8
    per_channel: PerChannel = True
    weight_range: Annotated[WeightRange, Field(description="how a weight's range is set")] = "mse"
    activation_range: Annotated[Range, Field(description="how an activation's range is set")] = "mse"
    percentile: Percentile = 99.99
    iterations: Annotated[int, Field(ge=1, description="for each layer, of a batch of 32 images")] = 1000
    calibration_images: Annotated[int, Field(ge=32, description="images looked at, without labels")] = 512
    seed: Annotated[int, Field(ge=0, lt=2**32, description="of the batches that are drawn")] = 0
    exclude: Exclude = ()

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Captures the network and lays quantizers on weights and edges; `begin` learns how they round.

        Raises:
            InputError: no data, a pattern of `exclude` that matches nothing, no layer left, a grid already there.
        """
        return ReconstructionAttachment(
            model,
            Precision(self.bits, self.activation_bits, self.first_last_bits, self.per_channel),
            exclude=self.exclude,
            context=context,
            ranges=Ranges(self.weight_range, self.activation_range, self.percentile, self.calibration_images),
            how=Reconstruction(
                whole_sections=False, learn_steps=False, drop=0.0, iterations=self.iterations, seed=self.seed
            ),
            method="adaround",
        )
