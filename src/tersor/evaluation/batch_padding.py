"""Runs any number of images through a file with a fixed batch size. Needs numpy, never torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def in_batches_of(infer: Callable[[NDArray[Any]], NDArray[Any]], size: int) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """A function of any number of images (N, C, H, W), from `infer`, which takes `size`; the last batch is padded."""

    def infer_batches(images: NDArray[Any]) -> NDArray[Any]:
        if len(images) == size:
            return infer(images)
        outputs: list[NDArray[Any]] = []
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            output = infer(np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)]))
            if output.shape[:1] != (size,):
                return output  # not one row per image, which the caller refuses
            outputs.append(output[: len(batch)])
        return np.concatenate(outputs)

    return infer_batches
