"""Mixed precision: every layer's weight gets the bits that it needs, so many on average.

Dong et al., "HAWQ: Hessian AWare Quantization of Neural Networks with Mixed-Precision", ICCV 2019 (arXiv 1905.03696);
Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization", ICML 2021 (the bits by integer programming).

    error(l, b) = sum over images of |y_lb - y|^2 / sum over images of |y|^2         y, y_lb: logits (N, classes)
    bits b_l      minimise sum_l error(l, b_l)  subject to  sum_l n_l b_l <= average_bits * sum_l n_l
    weights       (C_out, ...)   w_hat = s_c * clip(round(w / s_c), -n, n),  n = 2^(b_l-1) - 1

y is what the network answers in float, y_lb with the weight of layer l alone on b bits, n_l the number of its weights.
Each layer takes one width, so this is a multiple-choice knapsack, solved exactly by dynamic programming over the bits
that are spent. Errors of layers are added as if they were independent, as in the papers.

The papers estimate a layer's error: HAWQ by the largest eigenvalue of its Hessian, by which it orders the layers and
leaves the bits to be picked by hand; V3 by the Hessian's trace times |w - w_hat|^2. Here it is measured, on a few
hundred images without labels, by one pass over them for each layer and width; there is no gradient. V3 bounds latency
or bit operations too, and gives a layer's input the bits of its weight; here activations have one width. The papers
train afterwards; here that is a stage of its own, `qat` or `lsq`, which takes the bits over. A layer that is excluded
counts neither in the sum nor in the average. Files hold up to four bits in a nibble, and five to eight in a byte.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.graph.capture import capture
from tersor.graph.feeding import first_images
from tersor.graph.layer_selection import weighted_layers
from tersor.quantization.calibration import Ranges, set_ranges
from tersor.quantization.grid import Grid
from tersor.quantization.integer_coverage import calibrated_coverage
from tersor.quantization.observers import Range, WeightRange
from tersor.quantization.precision import CalibrationImages, Exclude, Percentile, PerChannel, Precision
from tersor.quantization.quantizers import Quantizers, ends, insert_quantizers, notes
from tersor.quantization.sensitivity import sensitivity
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.method import PLAIN_VALUES

_CELLS = 2**18
"""Steps that the budget is spent in, at most: memory, and time for each layer and width."""

Bits = Annotated[int, Field(ge=2, le=8)]


def assign(errors: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], average: float) -> dict[str, int]:
    """The bits of every layer whose errors add up to the least, with at most `average` bits a weight.

    Exact where the sizes have a common divisor that cuts the budget into no more than 2^18 steps; otherwise a layer
    may be charged up to one step more than it takes. The budget holds in any case. Ties take the fewer bits.

    Args:
        errors: layer -> bits -> error; the widths may differ from layer to layer.
        sizes: layer -> number of weights.
        average: bits of a weight, at least what the layers have on their fewest bits.
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


@dataclass(frozen=True, config=PLAIN_VALUES)
class MixedPrecision:
    """Post-training quantization in which every layer gets bits of its own, so many on average; no labels."""

    example: ClassVar[dict[str, Any]] = {"average_bits": 3.5, "widths": (2, 3, 4, 8), "activation_range": "mse"}
    exempt: ClassVar[dict[str, str]] = {"off": "a grid rounds, the finest of 8 bits too"}

    average_bits: Annotated[float, Field(gt=2, le=8, description="of a weight, the mean over the weights")] = 5.0
    widths: Annotated[tuple[Bits, ...], Field(min_length=1, description="bits that a layer may get")] = (
        2,
        3,
        4,
        5,
        6,
        8,
    )
    activation_bits: Annotated[int, Field(ge=2, le=8, description="of an activation; 8 for what enters the ends")] = 8
    first_last_bits: Annotated[
        int | None,
        Field(ge=2, le=8, description="of the first and last layer, and what enters them; like the others if left"),
    ] = None
    per_channel: PerChannel = True
    weight_range: Annotated[WeightRange, Field(description="how a weight's range is set")] = "mse"
    activation_range: Annotated[Range, Field(description="how an activation's range is set")] = "minmax"
    percentile: Percentile = 99.99
    calibration_images: CalibrationImages = 512
    exclude: Exclude = ()

    def attach(self, model: nn.Module, context: AttachContext) -> MixedPrecisionAttachment:
        """Captures the network and lays quantizers on weights and edges; `begin` chooses their bits.

        Raises:
            InputError: no data, a pattern of `exclude` that matches nothing, no layer left, a grid already there, an
                average that no choice of widths meets.
        """
        if context.data is None:
            raise InputError(
                "mixed_precision needs images to measure on; none were given. Pass data=..., a few hundred suffice."
            )
        precision = Precision(max(self.widths), self.activation_bits, self.first_last_bits or 8, self.per_channel)
        quantizers = insert_quantizers(
            capture(model),
            precision,
            exclude=self.exclude,
            target=context.target,
            method="mixed_precision",
            original=model,
        )
        attachment = MixedPrecisionAttachment(self, quantizers, context)
        self._refuse_what_cannot_be_met(attachment.options, attachment.sizes)
        return attachment

    def _refuse_what_cannot_be_met(self, options: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> None:
        least = sum(size * min(options[name]) for name, size in sizes.items()) / sum(sizes.values())
        if least > self.average_bits:
            raise InputError(
                f"average_bits: {self.average_bits:g} cannot be met: with the fewest bits that they may get, the "
                f"layers have {least:.2f} on average. Write more than that, or fewer bits in `widths`"
                + (", or leave out first_last_bits." if self.first_last_bits else ".")
            )


class MixedPrecisionAttachment(Attachment):
    """Quantizers laid on a captured network; `begin` chooses the bits of the weights and sets all ranges."""

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
        """The `bits` of every layer's weight, and the `average_bits` that came of it."""
        bits = {name: self.quantizers.of_weight(name).grid.bits for name in self.quantizers.layers}
        spent = sum(self.sizes[name] * each for name, each in bits.items())
        return {"bits": bits, "average_bits": spent / sum(self.sizes.values())}

    def begin(self) -> None:
        """Measures every layer on every width, chooses, and calibrates. Does nothing a second time.

        Raises:
            InputError: the data holds no image; values are not finite.
        """
        if self.quantizers.enabled:
            return
        method = self.method
        device = next(self.model.parameters()).device
        images = list(first_images(self.data, method.calibration_images, device))  # a loader may shuffle anew
        bits = assign(self._errors(images), self.sizes, method.average_bits)
        for name, each in bits.items():
            self.quantizers.of_weight(name).grid = Grid.signed(each)
        ranges = Ranges(method.weight_range, method.activation_range, method.percentile, method.calibration_images)
        set_ranges(
            self.quantizers,
            images,
            ranges,
            target=self.context.target,
            method="mixed_precision",
            progress=self.context.progress,
        )
        self.notes = (
            self._said(),
            *notes(self.quantizers, self.context.target),
            *calibrated_coverage(self.model).notes,
        )

    def _errors(self, images: list[Tensor]) -> dict[str, dict[int, float]]:
        """Layer -> bits -> error of the logits; of a layer without a choice nothing is measured."""
        errors = {name: dict.fromkeys(options, 0.0) for name, options in self.options.items()}
        asked = [(name, bits) for name, options in self.options.items() if len(options) > 1 for bits in options]
        measured = sensitivity(
            self.quantizers,
            images,
            asked,
            target=self.context.target,
            weight_range=self.method.weight_range,
            percentile=self.method.percentile,
        )
        self.context.progress.start("sensitivity", len(asked))
        for cost in measured:
            errors[cost.layer][cost.bits] = cost.error
            self.context.progress.advance()
        return errors

    def _said(self) -> str:
        told = self.metrics
        layers = Counter(told["bits"].values())
        counted = ", ".join(f"{bits} for {layers[bits]}" for bits in sorted(layers))
        return f"bits of the weights: {counted} layers, {told['average_bits']:.2f} on average"
