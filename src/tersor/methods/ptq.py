"""Post-training quantization: quantizes a trained network, with a few hundred unlabeled images for calibration.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR
2018; Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018 (arXiv 1806.08342).

    weights       (C_out, ...)    w_hat = s_c * clip(round(w / s_c), -(2^(b-1) - 1), 2^(b-1) - 1), one s per channel c
    affine                        w_hat = s_c * (clip(round(w / s_c) + z_c, -2^(b-1), 2^(b-1) - 1) - z_c)
    activations   (N, ...)        x_hat = s * (clip(round(x / s) + z, 0, 2^b - 1) - z), one s and z per tensor

The papers differ on symmetric activations. Here activations are unsigned with a zero point, because ONNX Runtime fuses
only half of a residual network otherwise. BatchNorm stays in the graph: folding multiplies a channel's scale and leaves
its integers unchanged (a negative gamma flips their sign), so export folds exactly. The paper's grid includes -128;
without it, an integer stays on the grid when its sign is flipped. As in most later papers, the first and last layer and
their inputs have 8 bits.

The defaults come from `bench/ptq_defaults.py`. Biases are corrected (Nagel et al., ICCV 2019:
`quantization/bias_correction.py`). At 8 bits an activation's range ends at the largest values, and a weight's range
minimizes the squared error of the layer's output (`quantization/output_error.py`). Below 8 bits, in a network with
BatchNorm, ranges minimize the squared error, and the BatchNorms compensate for the changed means and variances; without
BatchNorm, the ranges of weights are `minmax`. Options: cross-layer equalization (`quantization/equalization.py`), and
`max_drop`, which keeps the most sensitive layers in float. On a processor that accumulates 8-bit products in 16 bits
(AVX2 without VNNI), weight scales are widened until no channel saturates: `quantization/observers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import fx, nn

from tersor.core.plain_values import plain_dataclass
from tersor.data.batch import OnePass, first_batch
from tersor.data.network_inputs import NetworkInput
from tersor.graph.batchnorm import Norm
from tersor.graph.capture import capture
from tersor.graph.comparison import few_images, undone_unless_same
from tersor.graph.eval_mode import checked_forward, first_images
from tersor.quantization.accuracy_control import FloatLayers, keep_in_float
from tersor.quantization.bias_correction import batch_of, correct, moments
from tersor.quantization.calibration import calibrate
from tersor.quantization.equalization import equalize
from tersor.quantization.integer_coverage import calibrated_coverage
from tersor.quantization.observers import Range, WeightRange
from tersor.quantization.output_error import input_energies, set_weight_grids
from tersor.quantization.product_error import without_inaccurate_products
from tersor.quantization.quantizer_options import BYTE, BitOptions, CalibrationOptions
from tersor.quantization.quantizers import Quantizers, insert_quantizers, notes, require_data
from tersor.tasks.task import Task
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.method import PLAIN_VALUES

AnyWeightRange = WeightRange | Literal["output_mse"]


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class PTQ(CalibrationOptions, BitOptions):
    """Post-training quantization of weights and activations; needs no training and no labels."""

    example: ClassVar[dict[str, Any]] = {
        "bits": 4,
        "weight_range": "mse",
        "activation_range": "mse",
        "equalize": True,
        "variance_correction": True,
    }
    exempt: ClassVar[dict[str, str]] = {"off": "rounding changes the network even at 8 bits"}

    symmetric: Annotated[
        bool, Field(description="symmetric weight grids; if false, weights of fewer than 8 bits get a zero point")
    ] = True
    weight_range: Annotated[
        AnyWeightRange | None,
        Field(
            description="how a weight's range is chosen; output_mse: by the squared error of the layer's output; "
            "default: mse if variance_correction is on; otherwise output_mse at 8 bits, minmax below"
        ),
    ] = None
    activation_range: Annotated[
        Range | None,
        Field(description="how an activation's range is chosen; default: minmax if everything has 8 bits, else mse"),
    ] = None
    equalize: Annotated[bool, Field(description="cross-layer equalization before quantization")] = False
    bias_correction: Annotated[
        bool, Field(description="correct the channel means that rounding shifts, by changing biases and BatchNorms")
    ] = True
    variance_correction: Annotated[
        bool | None,
        Field(
            description="correct means, and variances where a BatchNorm follows; default: for weights of fewer than "
            "8 bits in a network with BatchNorm"
        ),
    ] = None
    max_drop: Annotated[
        float | None,
        Field(
            ge=0,
            description="largest drop in the task's metric (accuracy in points; without labels, percent of predictions "
            "that change), measured on the first 2,000 images; as many of the most sensitive layers stay in float as "
            "necessary to meet it. Default: quantize all layers",
        ),
    ] = None

    def attach(self, model: nn.Module, context: AttachContext) -> PTQAttachment:
        """Captures the network and inserts quantizers, which are enabled after `begin` has calibrated them.

        Raises:
            InputError: no data, an `exclude` pattern that matches nothing, no layer left, a network already quantized.
        """
        require_data(context.data, "ptq")
        graph = capture(model, first_batch(context.data, "ptq"))
        quantizers = insert_quantizers(
            graph,
            replace(self.precision, symmetric=self.symmetric),
            exclude=self.exclude,
            target=context.target,
            method="ptq",
        )
        return PTQAttachment(self, quantizers, context)


class PTQAttachment(Attachment):
    """A captured network with quantizers; `begin` sets their ranges."""

    def __init__(self, method: PTQ, quantizers: Quantizers, context: AttachContext) -> None:
        super().__init__(quantizers.graph, notes=notes(quantizers, context.target))
        self.method = method
        self.quantizers = quantizers
        assert context.data is not None
        self.context, self.data = context, context.data
        self._float_layers: FloatLayers | None = None
        has_norms = any(isinstance(each, Norm) for each in quantizers.graph.modules())
        default = method.bits < 8 and has_norms
        self._variances = default if method.variance_correction is None else method.variance_correction
        plain: AnyWeightRange = "output_mse" if method.bits == BYTE else "minmax"
        self._weight_range: AnyWeightRange = method.weight_range or ("mse" if self._variances else plain)
        self._activation_range: Range = method.activation_range or (
            "mse" if min(method.bits, method.activation_bits) < 8 else "minmax"
        )

    @property
    def metrics(self) -> dict[str, Any]:
        """With `max_drop`: the layers `left_in_float`, and the remaining `drop` in the metric."""
        return (
            {}
            if self._float_layers is None
            else {"left_in_float": list(self._float_layers.layers), "drop": self._float_layers.drop}
        )

    def begin(self) -> None:
        """Calibrates in one or two passes over the images, and sets all ranges. A second call does nothing.

        Raises:
            InputError: the data contains no image, or cannot be read again though a range or `max_drop` needs a second
                pass.
        """
        method, graph = self.method, self.model
        assert isinstance(graph, fx.GraphModule)
        if self.quantizers.enabled or self._float_layers is not None:
            return
        if method.equalize:
            self._equalize(graph)
        corrects = method.bias_correction or self._variances
        by_output = self._weight_range == "output_mse"
        images = self._images_ahead() if corrects or by_output else None
        passes = 1 if self._activation_range == "minmax" else 2
        histograms = calibrate(
            self.quantizers,
            self.data,
            images=method.calibration_images,
            passes=passes,
            method="ptq",
            progress=self.context.progress,
        )
        refit = self._correction(images) if corrects and images is not None else _nothing
        self.set_weight_grids(images)
        self.quantizers.set_activation_grids(histograms, self._activation_range, method.percentile)
        self.quantizers = without_inaccurate_products(self.quantizers, self.data, self.context.target)
        refit()
        if method.max_drop is not None:
            self._float_layers = keep_in_float(
                self.quantizers,
                self.data,
                max_drop=method.max_drop,
                target=self.context.target,
                method="ptq",
                refit=refit,
                progress=self.context.progress,
                task=self.context.task,
            )
            self.notes += _note(self._float_layers, self.context.task)
        self.notes += calibrated_coverage(graph).notes

    def _equalize(self, graph: fx.GraphModule) -> None:
        """Equalizes, and undoes it if the outputs on a few images change."""
        few, self.data = few_images(self.data, next(graph.parameters()).device)
        pairs: list[int] = []
        with checked_forward(type(graph).__name__, few, captured=True):
            undone = undone_unless_same(graph, few, lambda: pairs.append(equalize(graph)), "cross-layer equalization")
        if undone is not None:
            self.notes += (undone,)
        elif not sum(pairs):
            self.notes += (_NO_PAIRS,)

    def set_weight_grids(self, images: NetworkInput | None) -> None:
        """Chooses the grid of every weight; a method with other grids overrides it.

        `begin` calls it before it corrects biases and statistics of BatchNorm for these grids.

        Args:
            images: the first calibration images; None if neither the grids nor the correction need them.
        """
        quantizers, target = self.quantizers, self.context.target
        if self._weight_range == "output_mse":
            assert images is not None
            set_weight_grids(quantizers, input_energies(quantizers, images[:_ENERGY_IMAGES]), target)
            return
        for name in quantizers.layers:
            quantizers.set_weight_grid(name, target, self._weight_range, self.method.percentile)

    def _images_ahead(self) -> NetworkInput:
        """The first images (N, C, H, W), which remain to be read."""
        if isinstance(self.data, Iterator):
            self.data = OnePass(self.data)
        ahead = self.data.ahead() if isinstance(self.data, OnePass) else self.data
        device = next(self.model.parameters()).device
        return batch_of(first_images(ahead, self.method.calibration_images, device))

    def _correction(self, images: NetworkInput) -> Callable[[], None]:
        """A function that corrects biases for the quantizers enabled when it is called. None may be enabled yet."""
        graph = self.quantizers.graph
        before = moments(graph, images)
        if not before and self.method.bias_correction:
            self.notes += (_NO_MEANS,)
        return partial(correct, graph, images, before, variances=self._variances)


_ENERGY_IMAGES = 128
"""Images for the mean squares of the inputs of layers."""

_NO_PAIRS = "equalize changed nothing: no layer's output goes to exactly one other layer, directly or through a ReLU"
_NO_MEANS = "bias_correction changed nothing: no layer has a bias, and no BatchNorm follows a layer"


def _nothing() -> None:
    pass


def _note(found: FloatLayers, task: Task) -> tuple[str, ...]:
    if not found.layers:
        return ()
    drop = f"the remaining drop is {found.drop:.2f} points"
    if not found.labelled:
        drop = f"{found.drop:.2f} % of the predictions still change"
    elif task.unit != "%":
        drop = f"the {task.metric} is still {found.drop:.4g} worse than in float"
    return (f"these layers stay in float because of max_drop: {', '.join(found.layers)}; {drop}",)
