"""How a file with a fixed batch runs any number of images. Needs numpy, never torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def in_batches_of(infer: Callable[[NDArray[Any]], NDArray[Any]], size: int) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Runs any number of images (N, C, H, W) through `infer`, which takes `size` at once; the last batch is padded."""

    def infer_batches(images: NDArray[Any]) -> NDArray[Any]:
        if len(images) == size:
            return infer(images)
        outputs: list[NDArray[Any]] = []
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            output = infer(np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)]))
            if output.shape[:1] != (size,):
                return output  # not a row for each image, which the caller refuses
            outputs.append(output[: len(batch)])
        return np.concatenate(outputs)

    return infer_batches
