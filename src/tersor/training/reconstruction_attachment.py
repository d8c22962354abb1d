"""What a method that learns how weights are rounded asks of a run: ranges first, then part by part."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.core.progress import Progress
from tersor.core.target import Target
from tersor.graph.capture import capture
from tersor.graph.feeding import first_images
from tersor.quantization.calibration import Ranges, set_ranges
from tersor.quantization.integer_coverage import integer_coverage
from tersor.quantization.precision import Precision
from tersor.quantization.quantizers import insert_quantizers, notes
from tersor.quantization.reconstruction import Reconstruction, reconstruct
from tersor.training.attachment import Attachment


class Reconstructed(Attachment):
    """Quantizers laid on a captured network; `begin` sets their ranges and learns how weights are rounded.

    Args:
        model: the network.
        precision: how finely it is to be rounded.
        exclude: patterns of layers that stay in float.
        data: batches of images, without labels.
        target: the runtime and processor that the network is made for.
        ranges: how ranges are set, and from how many images; the rounding is learned on the same.
        how: what is learned.
        method: how errors call who asks.

    Raises:
        InputError: no data, a pattern of `exclude` that matches nothing, no layer left, a grid already there.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: Precision,
        *,
        exclude: tuple[str, ...],
        data: Iterable[Any] | None,
        target: Target | None,
        ranges: Ranges,
        how: Reconstruction,
        method: str,
    ) -> None:
        if data is None:
            raise InputError(
                f"{method} needs images to look at; none were given. Pass data=..., a few hundred suffice."
            )
        self.target = target or Target()
        self.quantizers = insert_quantizers(
            capture(model), precision, exclude=exclude, target=self.target, method=method, original=model
        )
        super().__init__(self.quantizers.graph, notes=notes(self.quantizers, self.target))
        self.data, self.ranges, self.how, self.method = data, ranges, how, method
        self._original = copy.deepcopy(self.quantizers.graph)

    def begin(self) -> Iterator[Progress]:
        """Calibrates, then reconstructs part by part; goes on where it was left.

        Raises:
            InputError: the data holds no image, or cannot be read again.
        """
        self.model.eval()
        if not self.quantizers.enabled:
            yield from set_ranges(self.quantizers, self.data, self.ranges, target=self.target, method=self.method)
        device = next(self.model.parameters()).device
        images = torch.cat([*first_images(self.data, self.ranges.images, device)])
        yield from reconstruct(self.quantizers, self._original.eval(), images, self.how)
        self.notes += integer_coverage(self.model, images).notes
