"""What a teacher gives for images that come as they are in every epoch: it is asked once."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.data.batch import Batch
from tersor.training.objective import Outputs

_LOGITS = ""


class TeacherCache:
    """Outputs by an image's place in the data set, on the CPU.

    Args:
        images: how many there are at most.
    """

    def __init__(self, images: int) -> None:
        self._images = images
        self._values: dict[str, Tensor] = {}

    def add(self, batch: Batch, given: Outputs) -> None:
        """Keeps what the teacher gave for the images of `batch`.

        Raises:
            InputError: the memory does not suffice for all images.
        """
        assert batch.index is not None
        values = {_LOGITS: given.logits, **given.layers}
        if not self._values:
            self._values = self._empty(values)
        for path, value in values.items():
            self._values[path][batch.index.cpu()] = value.cpu()

    def __call__(self, batch: Batch) -> Outputs:
        """What the teacher gave for these images."""
        assert batch.index is not None
        index, device = batch.index.cpu(), batch.images.device
        found = {path: value[index].to(device) for path, value in self._values.items()}
        return Outputs(found.pop(_LOGITS), found)

    def _empty(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        wanted = sum(value[0].numel() * value.element_size() for value in values.values()) * self._images
        available = psutil.virtual_memory().available  # what the system can free up counts
        if wanted > available:
            layers = ", ".join(path for path in values if path)
            raise InputError(
                f"what the teacher gives for {self._images:,} images (logits{', ' * bool(layers)}{layers}) takes "
                f"{wanted / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory are available. Write cache: false, or "
                "methods that learn from fewer or later layers."
            )
        return {path: torch.empty((self._images, *value.shape[1:])) for path, value in values.items()}
