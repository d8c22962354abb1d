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

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tersor.core.affine import Grid, affine_parameters
from tersor.core.attachment import Attachment, Progress
from tersor.core.errors import InputError
from tersor.core.method import PLAIN_VALUES
from tersor.core.ranges import Histogram
from tersor.core.target import Target
from tersor.graph.capture import capture
from tersor.graph.quantizers import Quantizers, calibrate, lay

Range = Literal["minmax", "percentile", "mse"]


@dataclass(frozen=True, config=PLAIN_VALUES)
class PTQ:
    """Post-training quantization to integer grids; no training, no labels."""

    example: ClassVar[dict[str, Any]] = {"bits": 4, "weight_range": "mse", "activation_range": "mse"}
    exempt: ClassVar[dict[str, str]] = {"off": "a grid rounds, the finest of 8 bits too"}

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
        quantizers = lay(
            capture(model),
            bits=self.bits,
            activation_bits=self.activation_bits,
            exclude=self.exclude,
            target=target,
            method="ptq",
        )
        return PTQAttachment(self, quantizers, data, target)


class PTQAttachment(Attachment):
    """Quantizers laid on a captured network; `begin` sets their ranges."""

    def __init__(self, method: PTQ, quantizers: Quantizers, data: Iterable[Any], target: Target) -> None:
        super().__init__(quantizers.graph)
        self.method = method
        self.quantizers = quantizers
        self.data = data
        self.target = target

    def begin(self) -> Iterator[Progress]:
        """Calibrates: one or two passes over the images, then every range is set. Does nothing a second time.

        Raises:
            InputError: the data holds no image, or cannot be read twice where two passes are needed.
        """
        if self.quantizers.ready:
            return
        passes = 1 if self.method.activation_range == "minmax" else 2
        histograms = yield from calibrate(
            self.quantizers, self.data, images=self.method.calibration_images, passes=passes, method="ptq"
        )
        for name in self.quantizers.activations:
            quantizer = self.quantizers.of_activation(name)
            quantizer.set_grid(*affine_parameters(*self._range(histograms[name], quantizer.grid), quantizer.grid))
        for name in self.quantizers.layers:
            self.quantizers.set_weight_grid(name, self.target, self.method.weight_range)

    def _range(self, histogram: Histogram, grid: Grid) -> tuple[Tensor, Tensor]:
        match self.method.activation_range:
            case "minmax":
                return histogram.low, histogram.high
            case "percentile":
                return histogram.percentile(self.method.percentile)
            case "mse":
                return histogram.least_squares(grid)
