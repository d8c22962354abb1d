"""Learned step size quantization: trains the step size of every grid together with the weights.

Esser et al., "Learned Step Size Quantization", ICLR 2020; Bhalgat et al., "LSQ+: Improving low-bit quantization through
learnable offsets and better initialization", CVPR Workshops 2020.

    weights       (C_out, ...)    w_hat = s_c * clip(round(w / s_c), -n, n),  n = 2^(b-1) - 1
    activations   (N, ...)        x_hat = s * (clip(round(x / s) + z, 0, p) - z),  p = 2^b - 1
    gradient of s                 round(x / s) - x / s inside the range, x_hat / s outside;
                                  times 1 / sqrt(N p), where p is n for weights
    at the start                  s = 2 mean|w_c| / sqrt(n) for a weight

The paper has one step per weight tensor, and uses the point -2^(b-1) too. Here each channel has a step by default
(`per_channel: false` is the paper's), and learning starts from the grids of an earlier stage if there is one. In the
paper activations are positive and their steps start like those of weights. Here activations may be negative and have a
zero point, and their steps start from the range with the smallest squared error, as in LSQ+. `offset: true` learns that
zero point. As in the paper, N is the number of weights that share a step or, for activations, the number of values in
one image; common reimplementations count the values of the whole batch.

As in the paper, the first and last layer have 8 bits. At the end the steps become constants, which are exported.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.core.plain_values import plain_dataclass
from tersor.graph.batchnorm import FrozenAt
from tersor.graph.parametrization import parametrization_input
from tersor.quantization.calibration import calibrate
from tersor.quantization.grid import Grid
from tersor.quantization.integer_coverage import calibrated_coverage
from tersor.quantization.quantizer_options import QuantizedTrainingOptions
from tersor.quantization.quantizers import Quantizers, insert_or_reuse_quantizers, notes
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext, require_steps
from tersor.training.method import PLAIN_VALUES


def first_step(weight: Tensor, grid: Grid, *, per_channel: bool = True) -> Tensor:
    """The initial step, 2 mean|w| / sqrt(n): (C, ...) -> (C,), or () if all channels share it."""
    size = weight.detach().float().abs()
    mean = size.flatten(1).mean(1) if per_channel else size.mean()
    return torch.where(mean > 0, 2 * mean / grid.maximum**0.5, torch.ones_like(mean))


@plain_dataclass(frozen=True, config=PLAIN_VALUES)
class LSQ(QuantizedTrainingOptions):
    """Quantization-aware training with learned step sizes."""

    needs_steps: ClassVar[bool] = True
    example: ClassVar[dict[str, Any]] = {"bits": 3, "offset": True, "freeze_norm_at": 0.5}
    exempt: ClassVar[dict[str, str]] = {"off": "rounding changes the network even at 8 bits"}

    offset: Annotated[bool, Field(description="also learn the zero points of activations, as in LSQ+")] = False

    def attach(self, model: nn.Module, context: AttachContext) -> Attachment:
        """Captures the network and inserts quantizers, or reuses those of an earlier stage.

        Raises:
            InputError: no steps, no data, an `exclude` pattern that matches nothing, no layer left, options that
                contradict an earlier stage.
        """
        require_steps(context, "lsq")
        quantizers = insert_or_reuse_quantizers(model, self, data=context.data, target=context.target, method="lsq")
        for name in quantizers.layers:
            quantizers.of_weight(name).learn_step()
        for name in quantizers.activations:
            quantizers.of_activation(name).learn_step(offset=self.offset, of_images=True)
        return LSQAttachment(self, quantizers, context)


class LSQAttachment(Attachment):
    """Quantizers with learned step sizes."""

    scheduled_steps = 1

    def __init__(self, method: LSQ, quantizers: Quantizers, context: AttachContext) -> None:
        super().__init__(quantizers.graph, notes=notes(quantizers, context.target))
        self.method = method
        self.quantizers = quantizers
        self.context = context
        self._norms = FrozenAt(quantizers.graph, method.freeze_norm_at, context.steps)

    def begin(self) -> None:
        """Calibrates the first ranges in two passes over the images, or starts from the grids of an earlier stage.

        Raises:
            InputError: the data contains no image, or cannot be read twice.
        """
        self._norms.done(0)
        if self.quantizers.enabled:
            return
        assert self.context.data is not None
        histograms = calibrate(
            self.quantizers,
            self.context.data,
            images=self.method.calibration_images,
            passes=2,
            method="lsq",
            progress=self.context.progress,
        )
        self.quantizers.set_activation_grids(histograms, "mse")
        for name in self.quantizers.layers:
            quantizer = self.quantizers.of_weight(name)
            weight = parametrization_input(self.quantizers.graph.get_submodule(name), quantizer)
            quantizer.set_grid(first_step(weight, quantizer.grid, per_channel=bool(quantizer.scale.ndim)))
            self.quantizers.limit_for_avx2_saturation(name, self.context.target)
        self.notes += calibrated_coverage(self.model).notes

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Keeps the step sizes above zero, and sets each zero point to its learned offset, rounded to an integer."""
        for each in self.quantizers.all():
            each.follow_step()
        for name in self.quantizers.layers:
            self.quantizers.limit_for_avx2_saturation(name, self.context.target)
        self._norms.done(step + 1)

    def finish(self) -> None:
        """Makes the steps constants.

        Warns:
            CompressionWarning: no optimizer step was taken.
        """
        super().finish()
        for each in self.quantizers.all():
            each.fix_step()
