"""How finely a network is to be rounded, and the entries of a recipe that say so, shared by all that quantize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from tersor.quantization.grid import Grid

BYTE = 8

WeightBits = Annotated[int, Field(ge=2, le=BYTE, description="of a weight")]
ActivationBits = Annotated[int, Field(ge=2, le=BYTE, description="of an activation")]
InheritedWeightBits = Annotated[
    int | None, Field(ge=2, le=BYTE, description="of a weight; 8 if left, or those of the stage before")
]
ActivationBitsThatLie = Annotated[
    int | None, Field(ge=2, le=BYTE, description="of an activation; 8 if left, or those of the stage before")
]
EndsBitsThatLie = Annotated[
    int | None,
    Field(
        ge=2,
        le=BYTE,
        description="of the first and last layer, and what enters them; 8 if left, or those of the stage before",
    ),
]
PerChannelThatLie = Annotated[
    bool | None,
    Field(description="a grid for each output channel of a weight, or one; true if left, or as the stage before"),
]
EndsBits = Annotated[int, Field(ge=2, le=BYTE, description="of the first and last layer, and what enters them")]
PerChannel = Annotated[bool, Field(description="a grid for each output channel of a weight, or one")]
Percentile = Annotated[float, Field(gt=50, le=100, description="of a range of that name: percent of the values kept")]
CalibrationImages = Annotated[int, Field(ge=1, description="images looked at, without labels")]
Exclude = Annotated[tuple[str, ...], Field(description="patterns of layers that stay in float")]


@dataclass(frozen=True)
class Precision:
    """How finely a network is to be rounded.

    Attributes:
        bits: of a weight.
        activation_bits: of an activation.
        first_last_bits: of the first and the last layer's weight and input.
        per_channel: whether each output channel of a weight has a grid.
        symmetric: whether the weights' grids lie symmetrically around zero. Those of 8 bits always do: integers less
            their zero point would not fit into a byte, and with a zero point OpenVINO computes a layer in float.
    """

    bits: int = BYTE
    activation_bits: int = BYTE
    first_last_bits: int = BYTE
    per_channel: bool = True
    symmetric: bool = True

    def weight(self, *, end: bool) -> Grid:
        """The grid of a weight, of the first and last layer (`end`) or of another."""
        bits = self.first_last_bits if end else self.bits
        return Grid.signed(bits) if self.symmetric or bits == BYTE else Grid.full(bits)

    def activation(self, *, end: bool) -> Grid:
        """The grid of what enters the first and last layer (`end`), or of another activation."""
        return Grid.unsigned(self.first_last_bits if end else self.activation_bits)
