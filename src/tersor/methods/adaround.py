"""AdaRound: learns for each weight whether to round it up or down, to minimize its layer's output error.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020 (arXiv 2004.10568).

    weights       (C_out, ...)    w_hat = s_c * (clip(floor(w / s_c) + h(v), -n, n)),  h(v) in [0, 1] learned
    loss          of each layer   |f(W x) - f(W_hat x_hat)|^2 + lambda sum(1 - |2 h(v) - 1|^beta)

f is the layer's BatchNorm and activation, x its input in float, x_hat its input from the layers that are already
rounded. It needs a few hundred images and no labels. `quantization/reconstruction.py` has the formulas.

The paper folds BatchNorm first. Here it stays a module after the layer. This does not change which weights are rounded
up. The paper runs 10,000 iterations; the default here is 1,000 at ten times the learning rate. Activations are
quantized after all weights are rounded. The network may return any tensors, because the error is measured on the output
of each layer.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from tersor.core.plain_values import plain_dataclass
from tersor.quantization.quantizer_options import BitOptions, RangeOptions, ReconstructionImages, Seed, WeightBits
from tersor.quantization.reconstruction import Reconstruction
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.method import PLAIN_VALUES
from tersor.training.reconstruction_attachment import ReconstructionAttachment


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class AdaRound(RangeOptions, BitOptions):
    """Post-training quantization with weight rounding learned layer by layer; needs no labels."""

    example: ClassVar[dict[str, Any]] = {"bits": 3, "iterations": 20}
    exempt: ClassVar[dict[str, str]] = {"off": "rounding changes the network even at 8 bits"}

    bits: WeightBits = 4
    calibration_images: ReconstructionImages = 512
    iterations: Annotated[int, Field(ge=1, description="iterations per layer, with batches of 32 images")] = 1000
    seed: Seed = 0

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Captures the network and inserts quantizers; `begin` calibrates and learns the rounding.

        Raises:
            InputError: no data, an `exclude` pattern that matches nothing, no layer left, a network already quantized.
        """
        return ReconstructionAttachment(
            model,
            self.precision,
            exclude=self.exclude,
            context=context,
            ranges=self.ranges,
            how=Reconstruction(by_block=False, learn_steps=False, drop=0.0, iterations=self.iterations, seed=self.seed),
            method="adaround",
        )
