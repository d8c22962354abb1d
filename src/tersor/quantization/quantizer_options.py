"""Quantization options: the fields that the methods share, and the `Precision` and `Ranges` that they stand for.

A method inherits the records that it needs, so that its recipe entry stays flat: `ptq: {bits: 4}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from tersor.quantization.grid import Grid
from tersor.quantization.observers import Range, WeightRange

BYTE = 8
_INHERITED = "default: as in an earlier quantization stage if there is one, otherwise"

Bits = Annotated[int, Field(ge=2, le=BYTE)]
WeightBits = Annotated[Bits, Field(description="bits of a weight")]
ActivationBits = Annotated[Bits, Field(description="bits of an activation")]
PerChannel = Annotated[
    bool, Field(description="true: one scale per output channel; false: one scale for the whole weight tensor")
]
ActivationRange = Annotated[Range, Field(description="how an activation's range is chosen")]
Exclude = Annotated[
    tuple[str, ...],
    Field(description="layers that stay in float: names of layers or modules, or patterns such as layer1.*.conv2"),
]
CalibrationImages = Annotated[int, Field(ge=1, description="number of unlabeled images to calibrate with")]
ReconstructionImages = Annotated[int, Field(ge=32, description="unlabeled images for calibration and learned rounding")]
Seed = Annotated[int, Field(ge=0, lt=2**32, description="seed of the random batches")]


@dataclass(frozen=True)
class Precision:
    """Bit widths and kinds of the grids.

    Attributes:
        bits: bits of a weight.
        activation_bits: bits of an activation.
        first_last_bits: bits of the first and the last layer's weight and input.
        per_channel: whether each output channel of a weight has its own scale.
        symmetric: whether weight grids are symmetric around zero. 8-bit grids always are: integers minus their zero
            point would not fit into a byte, and OpenVINO computes a layer in float if its weight has a zero point.
    """

    bits: int = BYTE
    activation_bits: int = BYTE
    first_last_bits: int = BYTE
    per_channel: bool = True
    symmetric: bool = True

    def weight(self, *, end: bool) -> Grid:
        """The grid of the weight of the first or last layer (`end`) or of any other layer."""
        bits = self.first_last_bits if end else self.bits
        return Grid.signed(bits) if self.symmetric or bits == BYTE else Grid.full(bits)

    def activation(self, *, end: bool) -> Grid:
        """The grid of the input of the first or last layer (`end`) or of any other activation."""
        return Grid.unsigned(self.first_last_bits if end else self.activation_bits)


@dataclass(frozen=True)
class Ranges:
    """How ranges are chosen, and from how many images."""

    weights: WeightRange
    activations: Range
    percentile: float
    images: int


@dataclass(frozen=True)
class BitOptions:
    """Bit widths of post-training quantization."""

    bits: WeightBits = BYTE
    activation_bits: ActivationBits = BYTE
    first_last_bits: Annotated[Bits, Field(description="bits of the first and last layer's weights and inputs")] = BYTE
    per_channel: PerChannel = True

    @property
    def precision(self) -> Precision:
        """The grids of these options."""
        return Precision(self.bits, self.activation_bits, self.first_last_bits, self.per_channel)


@dataclass(frozen=True)
class CalibrationOptions:
    """Images for calibration, and layers that are not quantized."""

    calibration_images: CalibrationImages = 512
    percentile: Annotated[
        float, Field(gt=50, le=100, description="percent of the values inside the range, for `percentile` ranges")
    ] = 99.99
    exclude: Exclude = ()


@dataclass(frozen=True)
class RangeOptions(CalibrationOptions):
    """How the ranges of weights and activations are chosen."""

    weight_range: Annotated[WeightRange, Field(description="how a weight's range is chosen")] = "mse"
    activation_range: ActivationRange = "mse"

    @property
    def ranges(self) -> Ranges:
        """The ranges of these options."""
        return Ranges(self.weight_range, self.activation_range, self.percentile, self.calibration_images)


@dataclass(frozen=True)
class QuantizedTrainingOptions:
    """Options of methods that train with quantizers: new ones, or those of an earlier stage, whose widths stay."""

    bits: Annotated[int | None, Field(ge=2, le=BYTE, description=f"bits of a weight; {_INHERITED} 8")] = None
    activation_bits: Annotated[
        int | None, Field(ge=2, le=BYTE, description=f"bits of an activation; {_INHERITED} 8")
    ] = None
    first_last_bits: Annotated[
        int | None,
        Field(ge=2, le=BYTE, description=f"bits of the first and last layer's weights and inputs; {_INHERITED} 8"),
    ] = None
    per_channel: Annotated[
        bool | None,
        Field(
            description=f"true: one scale per output channel, false: one for the whole weight tensor; {_INHERITED} true"
        ),
    ] = None
    freeze_norm_at: Annotated[
        float, Field(ge=0, le=1, description="fraction of the stage after which BatchNorm statistics are frozen")
    ] = 1.0
    calibration_images: CalibrationImages = 512
    exclude: Exclude = ()

    @property
    def precision(self) -> Precision:
        """The grids of new quantizers."""
        return Precision(
            self.bits or BYTE, self.activation_bits or BYTE, self.first_last_bits or BYTE, self.per_channel is not False
        )
