"""BRECQ: rounding is learned block by block, so that what a residual block gives stays; with `drop`, QDrop.

Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", ICLR 2021 (arXiv
2102.05426); Wei et al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization", ICLR
2022 (arXiv 2203.05740).

    weights       (C_out, ...)    w_hat = s_c * (clip(floor(w / s_c) + h(v), -n, n)),  h(v) in [0, 1] learned
    activations   (N, ...)        x_hat = s * (clip(round(x / s) + z, 0, 2^b - 1) - z),  s learned as in LSQ
    loss          of each block   |B(x) - B_hat(x_hat)|^2 + lambda sum(1 - |2 h(v) - 1|^beta)

A block is what lies between two places of the graph where one value carries everything: a residual block, or a layer in
a row. x is its input in float, x_hat what reaches it from blocks that are rounded already: a few hundred images, no
labels. `quantization/reconstruction.py` has the formulas.

The steps of the activations are learned beside the rounding of the weights, on rounded activations, as in QDrop; with
a `drop` so large a share of them, and of the block's input, is left in float in every iteration: QDrop has 0.5. BRECQ's
paper learns the rounding on activations in float, and the steps after that; QDrop found that together is better, and so
did we: at W4A4 a ResNet-20 keeps 94.3 and 94.5 % of validation images right, one after the other 93.8.

BRECQ's paper weighs the error by the squared gradient of the task's loss (Fisher); its code, as released, does not by
default, and neither does this. The papers learn for 20,000 iterations a block; here 2,000 of ten times the rate are the
default, so that each of a block's two layers has as many as `adaround` gives it. BatchNorm stays behind its layer,
which gives every channel the same choice as folding.
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
class BRECQ:
    """Post-training quantization whose rounding is learned, block by block; no labels."""

    example: ClassVar[dict[str, Any]] = {"bits": 3, "activation_bits": 7, "drop": 0.5, "iterations": 20}
    exempt: ClassVar[dict[str, str]] = {"off": "a grid rounds, the finest of 8 bits too"}

    bits: WeightBits = 4
    activation_bits: ActivationBits = 8
    first_last_bits: EndsBits = 8
    per_channel: PerChannel = True
    weight_range: Annotated[WeightRange, Field(description="how a weight's range is set")] = "mse"
    activation_range: Annotated[Range, Field(description="how an activation's range is set")] = "mse"
    percentile: Percentile = 99.99
    iterations: Annotated[int, Field(ge=1, description="for each block, of a batch of 32 images")] = 2000
    drop: Annotated[
        float, Field(ge=0, lt=1, description="share of the activations left in float meanwhile; QDrop has 0.5")
    ] = 0.0
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
                whole_sections=True, learn_steps=True, drop=self.drop, iterations=self.iterations, seed=self.seed
            ),
            method="brecq",
        )
