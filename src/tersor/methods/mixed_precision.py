"""Mixed precision: chooses a bit width for each layer's weight, subject to a limit on the average.

Dong et al., "HAWQ: Hessian AWare Quantization of Neural Networks with Mixed-Precision", ICCV 2019 (arXiv 1905.03696);
Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", ICML 2021 (the bits by integer programming).

    error(l, b) = sum over images of |y_lb - y|^2 / sum over images of |y|^2         y, y_lb: outputs (N, ...)
    bits b_l      minimize sum_l error(l, b_l)  subject to  sum_l n_l b_l <= average_bits * sum_l n_l
    weights       (C_out, ...)   w_hat = s_c * clip(round(w / s_c), -n, n),  n = 2^(b_l-1) - 1

y: the network's outputs in float (all tensors); y_lb: the outputs with only the weight of layer l quantized, to b bits;
n_l: the number of weights of layer l. Choosing one width per layer is a multiple-choice knapsack, solved exactly by
dynamic programming over the total number of bits. As in the papers, the errors of layers are added as if they were
independent.

The papers estimate a layer's error: HAWQ by the largest eigenvalue of its Hessian, which orders the layers and leaves
the choice of bits to the user; V3 by the Hessian's trace times |w - w_hat|^2. Here the error is measured on a few
hundred unlabeled images, in one pass for each layer and width, without gradients. V3 can also bound latency or bit
operations, and gives a layer's input the bits of its weight; here all activations have one width. The papers fine-tune
afterwards; here that is a separate `qat` or `lsq` stage, which keeps the bits. An excluded layer counts neither in the
sum nor in the average. In files, up to four bits take half a byte, and five to eight take a byte.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from torch import nn

from tersor.core.errors import InputError, counted
from tersor.core.plain_values import plain_dataclass
from tersor.data.batch import first_batch
from tersor.data.network_inputs import NetworkInput
from tersor.graph.capture import capture
from tersor.graph.eval_mode import first_images
from tersor.graph.layer_selection import weighted_layers
from tersor.quantization.calibration import set_ranges
from tersor.quantization.grid import Grid
from tersor.quantization.integer_coverage import calibrated_coverage
from tersor.quantization.quantizer_options import (
    ActivationBits,
    ActivationRange,
    Bits,
    PerChannel,
    Precision,
    RangeOptions,
)
from tersor.quantization.quantizers import Quantizers, ends, insert_quantizers, notes, require_data
from tersor.quantization.sensitivity import sensitivity
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.method import PLAIN_VALUES

_SMALLEST_WIDTH = 2
_CELLS = 2**18
"""Largest number of units that the bit budget is divided into; bounds memory and time."""


def assign(errors: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], average: float) -> dict[str, int]:
    """Choose bits for every layer with the smallest sum of errors, and at most `average` bits per weight.

    The result is exact if a common divisor of the sizes divides the budget into at most 2^18 units; otherwise a layer
    may be charged up to one unit too much. The budget holds in either case. Among choices with equal errors, the one
    with fewer bits is taken.

    Args:
        errors: layer -> bits -> error; the possible widths may differ between layers.
        sizes: layer -> number of weights.
        average: bits per weight; at least the average of every layer's smallest width.
    """
    fewest = {name: min(options) for name, options in errors.items()}
    extra = {name: {bits: sizes[name] * (bits - fewest[name]) for bits in sorted(errors[name])} for name in errors}
    budget = math.floor(average * sum(sizes[name] for name in errors) + 1e-6)  # 4.1 is a little less than 4.1
    spare = min(budget - sum(sizes[name] * bits for name, bits in fewest.items()), sum(map(_most, extra.values())))
    assert spare >= 0, "the average can be met"
    unit = max(1, math.gcd(*(spent for options in extra.values() for spent in options.values())), -(-spare // _CELLS))
    cells = spare // unit
    least = np.zeros(cells + 1)  # of the layers so far, with at most so many steps
    chosen: list[Any] = []
    for name, options in extra.items():
        tried = np.full((len(options), cells + 1), np.inf)
        for row, (bits, spent) in enumerate(options.items()):
            steps = -(-spent // unit)
            if steps <= cells:
                tried[row, steps:] = least[: cells + 1 - steps] + errors[name][bits]
        chosen.append(tried.argmin(0).astype(np.uint8))
        least = tried.min(0)
    found: dict[str, int] = {}
    for (name, options), rows in zip(reversed(extra.items()), reversed(chosen), strict=True):
        found[name] = list(options)[rows[cells]]
        cells -= -(-options[found[name]] // unit)
    return {name: found[name] for name in errors}


def _most(options: Mapping[int, int]) -> int:
    return max(options.values())


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class MixedPrecision(RangeOptions):
    """Choose a bit width for each layer's weight, subject to a limit on the average; needs no training, no labels."""

    example: ClassVar[dict[str, Any]] = {"average_bits": 3.5, "widths": (2, 3, 4, 8), "activation_range": "mse"}
    exempt: ClassVar[dict[str, str]] = {"off": "rounding changes the network even at 8 bits"}

    average_bits: Annotated[float, Field(gt=2, le=8, description="largest mean bit width over all weights")] = 5.0
    widths: Annotated[tuple[Bits, ...], Field(min_length=1, description="possible bit widths of a layer")] = (
        2,
        3,
        4,
        5,
        6,
        8,
    )
    activation_bits: ActivationBits = 8
    first_last_bits: Annotated[
        int | None,
        Field(
            ge=2,
            le=8,
            description="bits of the first and last layer's weights and inputs; default: chosen bits for weights, 8 "
            "for inputs",
        ),
    ] = None
    per_channel: PerChannel = True
    activation_range: ActivationRange = "minmax"

    def attach(self, model: nn.Module, context: AttachContext) -> MixedPrecisionAttachment:
        """Captures the network and inserts quantizers; `begin` chooses their bits.

        Raises:
            InputError: no data, an `exclude` pattern that matches nothing, no layer left, a network already quantized,
                an average that no choice of widths meets.
        """
        require_data(context.data, "mixed_precision")
        precision = Precision(max(self.widths), self.activation_bits, self.first_last_bits or 8, self.per_channel)
        quantizers = insert_quantizers(
            capture(model, first_batch(context.data, "mixed_precision")),
            precision,
            exclude=self.exclude,
            target=context.target,
            method="mixed_precision",
        )
        attachment = MixedPrecisionAttachment(self, quantizers, context)
        self._refuse_what_cannot_be_met(attachment.options, attachment.sizes)
        return attachment

    def _refuse_what_cannot_be_met(self, options: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> None:
        least = sum(size * min(options[name]) for name, size in sizes.items()) / sum(sizes.values())
        if least > self.average_bits:
            smaller = ", or add a smaller width to `widths`" * (min(self.widths) > _SMALLEST_WIDTH)
            chosen = ", or leave out first_last_bits" * ((self.first_last_bits or 0) > min(self.widths))
            raise InputError(
                f"average_bits: {self.average_bits:g} is too low: the smallest possible average is {least:.2f}. Write "
                f"a larger average_bits{smaller}{chosen}."
            )


class MixedPrecisionAttachment(Attachment):
    """A captured network with quantizers; `begin` chooses the weights' bits and sets all ranges."""

    def __init__(self, method: MixedPrecision, quantizers: Quantizers, context: AttachContext) -> None:
        super().__init__(quantizers.graph)
        self.method = method
        self.quantizers = quantizers
        assert context.data is not None
        self.context, self.data = context, context.data
        layers = weighted_layers(quantizers.graph)
        self.sizes = {name: layers[name].weight.numel() for name in quantizers.layers}
        fixed = ends(quantizers.graph) if method.first_last_bits else set[str]()
        self.options = {
            name: (method.first_last_bits,)
            if method.first_last_bits and name in fixed
            else tuple(sorted({*method.widths}))
            for name in quantizers.layers
        }

    @property
    def metrics(self) -> dict[str, Any]:
        """The `bits` of every layer's weight, and their average over all weights, `average_bits`."""
        bits = {name: self.quantizers.of_weight(name).grid.bits for name in self.quantizers.layers}
        spent = sum(self.sizes[name] * each for name, each in bits.items())
        return {"bits": bits, "average_bits": spent / sum(self.sizes.values())}

    def begin(self) -> None:
        """Measures every layer at every width, chooses the bits, and calibrates. A second call does nothing.

        Raises:
            InputError: the data contains no image, or a value is not finite.
        """
        if self.quantizers.enabled:
            return
        method = self.method
        device = next(self.model.parameters()).device
        images = list(first_images(self.data, method.calibration_images, device))  # a loader may shuffle again
        bits = assign(self._errors(images), self.sizes, method.average_bits)
        for name, each in bits.items():
            self.quantizers.of_weight(name).grid = Grid.signed(each)
        set_ranges(
            self.quantizers,
            images,
            method.ranges,
            target=self.context.target,
            method="mixed_precision",
            progress=self.context.progress,
        )
        self.notes = (
            self._note(),
            *notes(self.quantizers, self.context.target),
            *calibrated_coverage(self.model).notes,
        )

    def _errors(self, images: list[NetworkInput]) -> dict[str, dict[int, float]]:
        """Layer -> bits -> error of the outputs; a layer with a single width is not measured."""
        errors = {name: dict.fromkeys(options, 0.0) for name, options in self.options.items()}
        candidates = [(name, bits) for name, options in self.options.items() if len(options) > 1 for bits in options]
        measured = sensitivity(
            self.quantizers,
            images,
            candidates,
            target=self.context.target,
            weight_range=self.method.weight_range,
            percentile=self.method.percentile,
            task=self.context.task,
        )
        self.context.progress.start("sensitivity", len(candidates))
        for cost in measured:
            errors[cost.layer][cost.bits] = cost.error
            self.context.progress.advance()
        return errors

    def _note(self) -> str:
        metrics = self.metrics
        layers = Counter(metrics["bits"].values())
        widths = ", ".join(f"{bits} bits in {counted(layers[bits], 'layer')}" for bits in sorted(layers))
        return f"weight bits: {widths}; {metrics['average_bits']:.2f} on average"
