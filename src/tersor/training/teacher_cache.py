"""A cache of the teacher's outputs, for images that are the same in every epoch."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tersor.core.errors import InputError
from tersor.data.batch import Batch
from tersor.training.objective import ForwardContext, Outputs


class TeacherCache:
    """Teacher outputs by the image's index in the data set, on the CPU.

    Args:
        images: largest number of images.
    """

    def __init__(self, images: int) -> None:
        self._images = images
        self._values: list[Tensor] = []
        self._structure: TreeSpec | None = None
        self._context = ForwardContext()

    def add(self, batch: Batch, outputs: Outputs) -> None:
        """Store the teacher's outputs for a batch.

        Raises:
            InputError: they are not tensors with one entry for each image, or those of all images do not fit into
                memory.
        """
        assert batch.index is not None
        values, self._structure = tree_flatten((outputs.outputs, dict(outputs.layers)))
        self._context = outputs.context
        if not self._values:
            self._values = self._empty(values, len(batch.images), tuple(outputs.layers))
        for stored, value in zip(self._values, values, strict=True):
            stored[batch.index.cpu()] = value.cpu()

    def __call__(self, batch: Batch) -> Outputs:
        """The stored outputs for a batch."""
        assert batch.index is not None
        assert self._structure is not None
        index, device = batch.index.cpu(), batch.images.device
        outputs, layers = tree_unflatten([value[index].to(device) for value in self._values], self._structure)
        return Outputs(outputs, layers, self._context)

    def _empty(self, values: list[Any], images: int, layers: tuple[str, ...]) -> list[Tensor]:
        if not all(isinstance(value, Tensor) and value.shape[:1] == (images,) for value in values):
            raise InputError(
                "the teacher's outputs cannot be cached: they are not tensors with one entry for each image. Write "
                "cache: false."
            )
        required = sum(value[0].numel() * value.element_size() for value in values) * self._images
        available = psutil.virtual_memory().available  # includes memory that the system can free
        if required > available:
            raise InputError(
                f"the teacher's outputs for {self._images:,} images ({', '.join(('logits', *layers))}) take "
                f"{required / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory are available. Write cache: false, "
                "or choose methods that use fewer or later layers."
            )
        return [torch.empty((self._images, *value.shape[1:]), dtype=value.dtype) for value in values]
