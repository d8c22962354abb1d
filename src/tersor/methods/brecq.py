"""BRECQ: learns rounding block by block to minimize each block's output error; `drop` turns it into QDrop.

Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", ICLR 2021 (arXiv
2102.05426); Wei et al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization", ICLR
2022 (arXiv 2203.05740).

    weights       (C_out, ...)    w_hat = s_c * (clip(floor(w / s_c) + h(v), -n, n)),  h(v) in [0, 1] learned
    activations   (N, ...)        x_hat = s * (clip(round(x / s) + z, 0, 2^b - 1) - z),  s learned as in LSQ
    loss          of each block   |B(x) - B_hat(x_hat)|^2 + lambda sum(1 - |2 h(v) - 1|^beta)

The network is cut at each node whose value is the only connection between earlier and later nodes. A block is the part
of the graph between two consecutive cuts: a residual block, or one layer of a sequence. x is its input in float, x_hat
its input from the blocks that are already rounded. It needs a few hundred images and no labels. The network may return
any tensors: the error of the last block is measured on all of them. `quantization/reconstruction.py` has the formulas.

As in QDrop, activation steps are learned together with the rounding, on rounded activations; `drop` is the share of
these activations, and of the block's input values, that stays in float in each iteration (QDrop: 0.5). BRECQ's paper
learns the rounding on activations in float, and the steps afterwards. Learning both together was better in QDrop's
paper and here: a W4A4 ResNet-20 classifies at least 94.3 % of the validation images correctly, compared with 93.8 % if
they are learned one after another.

BRECQ's paper weights the error by the squared gradient of the task loss (Fisher). Its released code does not do this by
default, nor does this file. The papers run 20,000 iterations per block; the default here is 2,000 per block at ten
times the learning rate: as many in total as `adaround` runs for two layers. BatchNorm stays a module after its layer.
This does not change which weights are rounded up.
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
class BRECQ(RangeOptions, BitOptions):
    """Post-training quantization with weight rounding and activation steps learned block by block; needs no labels."""

    example: ClassVar[dict[str, Any]] = {"bits": 3, "activation_bits": 7, "drop": 0.5, "iterations": 20}
    exempt: ClassVar[dict[str, str]] = {"off": "rounding changes the network even at 8 bits"}

    bits: WeightBits = 4
    calibration_images: ReconstructionImages = 512
    iterations: Annotated[int, Field(ge=1, description="iterations per block, with batches of 32 images")] = 2000
    drop: Annotated[
        float, Field(ge=0, lt=1, description="fraction of activations left in float in each iteration; QDrop: 0.5")
    ] = 0.0
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
            how=Reconstruction(
                by_block=True, learn_steps=True, drop=self.drop, iterations=self.iterations, seed=self.seed
            ),
            method="brecq",
        )
