"""A cache of the teacher's outputs, for images that are the same in every epoch."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.data.batch import Batch
from tersor.training.objective import Outputs

_LOGITS = ""


class TeacherCache:
    """Teacher outputs by the image's index in the data set, on the CPU.

    Args:
        images: largest number of images.
    """

    def __init__(self, images: int) -> None:
        self._images = images
        self._values: dict[str, Tensor] = {}

    def add(self, batch: Batch, outputs: Outputs) -> None:
        """Store the teacher's outputs for a batch.

        Raises:
            InputError: the outputs of all images do not fit into memory.
        """
        assert batch.index is not None
        values = {_LOGITS: outputs.logits, **outputs.layers}
        if not self._values:
            self._values = self._empty(values)
        for path, value in values.items():
            self._values[path][batch.index.cpu()] = value.cpu()

    def __call__(self, batch: Batch) -> Outputs:
        """The stored outputs for a batch."""
        assert batch.index is not None
        index, device = batch.index.cpu(), batch.images.device
        values = {path: value[index].to(device) for path, value in self._values.items()}
        return Outputs(values.pop(_LOGITS), values)

    def _empty(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        required = sum(value[0].numel() * value.element_size() for value in values.values()) * self._images
        available = psutil.virtual_memory().available  # includes memory that the system can free
        if required > available:
            layers = ", ".join(path for path in values if path)
            raise InputError(
                f"the teacher's outputs for {self._images:,} images (logits{', ' * bool(layers)}{layers}) take "
                f"{required / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory are available. Write cache: false, "
                "or choose methods that use fewer or later layers."
            )
        return {path: torch.empty((self._images, *value.shape[1:])) for path, value in values.items()}
