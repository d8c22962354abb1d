"""Runs any number of images through a file with a fixed batch size. Needs numpy, never torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tersor.evaluation.file_inputs import Array, FileArrays

Inference = Callable[[FileArrays], Array]
InferenceOfAll = Callable[[FileArrays], Sequence[Array]]
"""Images (N, C, H, W), or several arrays -> one output, or all outputs of a file."""


def in_batches_of(infer: Inference, size: int) -> Inference:
    """Wrap `infer`, which takes exactly `size` images (N, C, H, W), to take any number; the last batch is padded."""
    infer_all = all_in_batches_of(lambda images: [infer(images)], size)
    return lambda images: infer_all(images)[0]


def all_in_batches_of(infer: InferenceOfAll, size: int) -> InferenceOfAll:
    """The same for all outputs of a file."""

    def infer_batches(images: FileArrays) -> Sequence[Array]:
        if len(images) == size:
            return infer(images)
        batches: list[list[Array]] = []
        for start in range(0, len(images), size):
            outputs = infer(images[np.minimum(np.arange(start, start + size), len(images) - 1)])
            if any(output.shape[:1] != (size,) for output in outputs):
                return outputs  # not one row per image, which the caller refuses
            batches.append([output[: len(images) - start] for output in outputs])
        return [np.concatenate(each) for each in zip(*batches, strict=True)]

    return infer_batches
