"""The attachment of methods that learn weight rounding: calibration first, then block by block."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.data.batch import first_batch
from tersor.data.network_inputs import joined_inputs
from tersor.graph.capture import capture
from tersor.graph.eval_mode import first_images
from tersor.quantization.calibration import set_ranges
from tersor.quantization.integer_coverage import integer_coverage
from tersor.quantization.quantizer_options import Precision, Ranges
from tersor.quantization.quantizers import insert_quantizers, notes, require_data
from tersor.quantization.reconstruction import Reconstruction, reconstruct
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext


class ReconstructionAttachment(Attachment):
    """Inserts quantizers into a captured network; `begin` calibrates them and learns the rounding of the weights.

    Args:
        model: the network.
        precision: bit widths.
        exclude: patterns of layers that stay in float.
        context: data without labels, target, progress.
        ranges: how ranges are calibrated, and on how many images; the rounding is learned on the same images.
        how: options of the reconstruction.
        method: the method's name, for error messages.

    Raises:
        InputError: no data, a pattern of `exclude` without a match, no layer left, an already quantized layer.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: Precision,
        *,
        exclude: tuple[str, ...],
        context: AttachContext,
        ranges: Ranges,
        how: Reconstruction,
        method: str,
    ) -> None:
        data = require_data(context.data, method)
        images = first_batch(data, method)
        if not isinstance(images, Tensor):
            raise InputError(
                f"{method} supports only networks with one input tensor; this one has {len(images.all())}. Write ptq "
                "or qat."
            )
        self.quantizers = insert_quantizers(
            capture(model, images),
            precision,
            exclude=exclude,
            target=context.target,
            method=method,
        )
        super().__init__(self.quantizers.graph, notes=notes(self.quantizers, context.target))
        self.context, self.data = context, data
        self.ranges, self.how, self.method = ranges, how, method
        self._original = copy.deepcopy(self.quantizers.graph)

    def begin(self) -> None:
        """Calibrate, then reconstruct block by block; an interrupted run resumes at its last block.

        Raises:
            InputError: the data has no image, or cannot be iterated again.
        """
        self.model.eval()
        if not self.quantizers.enabled:
            set_ranges(
                self.quantizers,
                self.data,
                self.ranges,
                target=self.context.target,
                method=self.method,
                progress=self.context.progress,
            )
        device = next(self.model.parameters()).device
        images = joined_inputs(first_images(self.data, self.ranges.images, device))
        assert isinstance(images, Tensor)
        reconstruct(
            self.quantizers,
            self._original.eval(),
            images,
            self.how,
            progress=self.context.progress,
            checkpoint=lambda: self.context.checkpoint(self.model),
        )
        self.notes += integer_coverage(self.model, images).notes
