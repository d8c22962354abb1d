"""How a file with a fixed batch runs any number of images. Needs numpy, never torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def in_pieces(infer: Callable[[NDArray[Any]], NDArray[Any]], size: int) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Runs any number of images (N, C, H, W) through `infer`, which takes `size`; the last piece is padded."""

    def infer_pieces(images: NDArray[Any]) -> NDArray[Any]:
        if len(images) == size:
            return infer(images)
        outputs: list[NDArray[Any]] = []
        for start in range(0, len(images), size):
            piece = images[start : start + size]
            output = infer(np.concatenate([piece, np.repeat(piece[-1:], size - len(piece), axis=0)]))
            if output.shape[:1] != (size,):
                return output  # not a row for each image, which the caller refuses
            outputs.append(output[: len(piece)])
        return np.concatenate(outputs)

    return infer_pieces
