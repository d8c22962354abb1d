"""Post-training quantization: a trained network on integer grids, from a few hundred images without labels.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR
2018; Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018 (arXiv 1806.08342).

    weights       (C_out, ...)    w_hat = s_c * clip(round(w / s_c), -(2^(b-1) - 1), 2^(b-1) - 1), one s for each c
    affine                        w_hat = s_c * (clip(round(w / s_c) + z_c, -2^(b-1), 2^(b-1) - 1) - z_c)
    activations   (N, ...)        x_hat = s * (clip(round(x / s) + z, 0, 2^b - 1) - z), one s and z for the tensor

The papers differ on symmetric activations; here they are unsigned with a zero point, since ONNX Runtime fuses half of
a residual network only then. BatchNorm stays alive: folding it multiplies a channel's scale and leaves its integers
as they are (a negative gamma flips their sign), so export folds exactly. The paper's grid keeps -128; without it a
flipped sign stays on the grid. First and last layer have 8 bits, their inputs too, as in every later paper.

Around it: cross-layer equalisation and bias correction (Nagel et al., ICCV 2019: `quantization/equalization.py`,
`quantization/bias_correction.py`), and `max_drop`, which leaves the layers in float that cost too much. What is left is
chosen by `bench/ptq_defaults.py`: at 8 bits the largest values end a range; with fewer, ranges have the smallest
squared error, and a BatchNorm takes over what rounding did to means and spreads. On a processor that adds 8-bit
products in 16 bits (AVX2 without VNNI) weights of a channel are kept from saturating: `quantization/observers.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import fx, nn

from tersor.core.errors import InputError
from tersor.graph.batchnorm import Norm
from tersor.graph.capture import capture
from tersor.graph.comparison import few_images, undone_unless_same
from tersor.graph.feeding import checked_forward, first_images
from tersor.graph.norms import record_ranks
from tersor.quantization.accuracy_control import Kept, keep_in_float
from tersor.quantization.bias_correction import batch_of, correct, moments
from tersor.quantization.calibration import calibrate
from tersor.quantization.equalization import equalize
from tersor.quantization.integer_coverage import calibrated_coverage
from tersor.quantization.observers import Range, WeightRange
from tersor.quantization.precision import (
    ActivationBits,
    CalibrationImages,
    EndsBits,
    Exclude,
    Percentile,
    PerChannel,
    Precision,
    WeightBits,
)
from tersor.quantization.quantizers import Quantizers, insert_quantizers, notes
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.method import PLAIN_VALUES


@dataclass(frozen=True, config=PLAIN_VALUES)
class PTQ:
    """Post-training quantization to integer grids; no training, no labels."""

    example: ClassVar[dict[str, Any]] = {
        "bits": 4,
        "weight_range": "mse",
        "activation_range": "mse",
        "equalize": True,
        "variance_correction": True,
    }
    exempt: ClassVar[dict[str, str]] = {"off": "a grid rounds, the finest of 8 bits too"}

    bits: WeightBits = 8
    activation_bits: ActivationBits = 8
    first_last_bits: EndsBits = 8
    per_channel: PerChannel = True
    symmetric: Annotated[
        bool, Field(description="weights on a grid around zero; else those of fewer than 8 bits get a zero point")
    ] = True
    weight_range: Annotated[
        WeightRange | None,
        Field(description="how a weight's range is set; if left: mse with variance_correction, else minmax"),
    ] = None
    activation_range: Annotated[
        Range | None,
        Field(description="how an activation's range is set; if left: minmax where all is of 8 bits, else mse"),
    ] = None
    percentile: Percentile = 99.99
    equalize: Annotated[bool, Field(description="cross-layer equalisation before anything is rounded")] = False
    bias_correction: Annotated[bool, Field(description="what rounding adds to channels' means is taken away")] = False
    variance_correction: Annotated[
        bool | None,
        Field(
            description="the same, and what it does to their spread, where a BatchNorm can take it over; if left: for "
            "weights of fewer than 8 bits in a network with BatchNorm"
        ),
    ] = None
    max_drop: Annotated[
        float | None,
        Field(
            ge=0,
            description="points of accuracy on the images that it calibrates with, of which a network is surer than of "
            "others; layers that cost more stay in float. All are rounded if left",
        ),
    ] = None
    calibration_images: CalibrationImages = 512
    exclude: Exclude = ()

    def attach(self, model: nn.Module, context: AttachContext) -> PTQAttachment:
        """Captures the network and lays quantizers on weights and edges; they round once `begin` has calibrated them.

        Raises:
            InputError: no data, a pattern of `exclude` that matches nothing, no layer left, a grid already there.
        """
        if context.data is None:
            raise InputError(
                "ptq needs images to calibrate with; none were given. Pass data=..., a few hundred suffice."
            )
        graph = capture(model)
        bare = None if self.max_drop is None else fx.GraphModule(graph, copy.deepcopy(graph.graph))
        precision = Precision(self.bits, self.activation_bits, self.first_last_bits, self.per_channel, self.symmetric)
        quantizers = insert_quantizers(
            graph, precision, exclude=self.exclude, target=context.target, method="ptq", original=model
        )
        return PTQAttachment(self, quantizers, context, bare)


class PTQAttachment(Attachment):
    """Quantizers laid on a captured network; `begin` sets their ranges."""

    def __init__(
        self,
        method: PTQ,
        quantizers: Quantizers,
        context: AttachContext,
        bare: fx.GraphModule | None,
    ) -> None:
        super().__init__(quantizers.graph, notes=notes(quantizers, context.target))
        self.method = method
        self.quantizers = quantizers
        assert context.data is not None
        self.context, self.data = context, context.data
        self._bare = bare
        self._kept: Kept | None = None
        has_norms = any(isinstance(each, Norm) for each in quantizers.graph.modules())
        left = method.bits < 8 and has_norms
        self._spreads = left if method.variance_correction is None else method.variance_correction
        self._weight_range: WeightRange = method.weight_range or ("mse" if self._spreads else "minmax")
        self._activation_range: Range = method.activation_range or (
            "mse" if min(method.bits, method.activation_bits) < 8 else "minmax"
        )

    @property
    def metrics(self) -> dict[str, Any]:
        """With `max_drop`: the layers that were `left_in_float`, and the `drop` that is left."""
        return {} if self._kept is None else {"left_in_float": list(self._kept.layers), "drop": self._kept.drop}

    def begin(self) -> None:
        """Calibrates: one or two passes over the images, then every range is set. Does nothing a second time.

        Raises:
            InputError: the data holds no image, or cannot be read again where a range, bias correction or
                `max_drop` needs that.
        """
        method, graph = self.method, self.model
        assert isinstance(graph, fx.GraphModule)
        if self.quantizers.enabled or self._kept is not None:
            return
        if method.equalize:
            self._equalize(graph)
        passes = 1 if self._activation_range == "minmax" else 2
        histograms = calibrate(
            self.quantizers,
            self.data,
            images=method.calibration_images,
            passes=passes,
            method="ptq",
            progress=self.context.progress,
        )
        settle = self._correction() if method.bias_correction or self._spreads else _nothing
        self.quantizers.set_activation_grids(histograms, self._activation_range, method.percentile)
        for name in self.quantizers.layers:
            self.quantizers.set_weight_grid(name, self.context.target, self._weight_range, method.percentile)
        settle()
        if self._bare is not None and method.max_drop is not None:
            self._kept = keep_in_float(
                self.quantizers,
                self._bare,
                self.data,
                max_drop=method.max_drop,
                target=self.context.target,
                method="ptq",
                settle=settle,
                progress=self.context.progress,
            )
            self.notes += _said(self._kept)
        self.notes += calibrated_coverage(graph).notes

    def _equalize(self, graph: fx.GraphModule) -> None:
        """Compares what the network computes before and after, on a few images."""
        few, self.data = few_images(self.data, next(graph.parameters()).device)
        with checked_forward(type(graph).__name__, few, captured=True):
            record_ranks(graph, few)
            undone = undone_unless_same(graph, few, partial(equalize, graph), "cross-layer equalisation")
        self.notes += () if undone is None else (undone,)

    def _correction(self) -> Callable[[], None]:
        """Corrects biases for what rounds whenever it is called; nothing rounds yet."""
        graph = self.quantizers.graph
        device = next(graph.parameters()).device
        images = batch_of(first_images(self.data, self.method.calibration_images, device))
        return partial(correct, graph, images, moments(graph, images), spreads=self._spreads)


def _nothing() -> None:
    pass


def _said(kept: Kept) -> tuple[str, ...]:
    if not kept.layers:
        return ()
    return (f"in float, since they cost too much: {', '.join(kept.layers)}; the drop is {kept.drop:.2f} with that",)
