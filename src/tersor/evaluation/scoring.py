"""Predictions of networks and of files for many images, and their metric, as the task defines both."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tersor.core.errors import InputError
from tersor.core.inputs import Inputs
from tersor.data import Batches
from tersor.data.batch import Batch
from tersor.data.network_inputs import NetworkInput
from tersor.deploy.outputs import LOGITS
from tersor.evaluation.file_inputs import FileArrays
from tersor.evaluation.session import Session
from tersor.graph.eval_mode import evaluating
from tersor.graph.forward_call import run
from tersor.tasks.classification import Classification
from tersor.tasks.network_outputs import in_float32
from tersor.tasks.task import Task

_IMAGES_AT_ONCE = 500
_PIXELS_AT_ONCE = 2**20
"""Largest number of pixels in a batch whose outputs may have as many pixels as the images. The UNet then needs 0.7 GB.
"""
_OF_A_TUPLE = re.compile(r"output_\d+")


def images_at_once(task: Task, size: tuple[int, int]) -> int:
    """Images of this height and width per batch of a measurement."""
    if isinstance(task, Classification):
        return _IMAGES_AT_ONCE
    return max(1, min(_IMAGES_AT_ONCE, _PIXELS_AT_ONCE // (size[0] * size[1])))


def network_predictions(model: nn.Module, batches: Iterable[Batch], task: Task | None = None) -> Any:
    """The predictions of `model` in eval mode for all images, on the CPU, as one batch; None without images."""
    task = task or Classification()
    return joined(predicted for _, predicted in _predicted(model, batches, task))


def arrays_of(inputs: NetworkInput) -> FileArrays:
    """The input of a network as arrays for a file."""
    if isinstance(inputs, Tensor):
        return np.ascontiguousarray(inputs.cpu().numpy())
    return Inputs.of(inputs.kwargs, [np.ascontiguousarray(each.cpu().numpy()) for each in inputs.all()])


def file_predictions(session: Session, arrays: Iterable[FileArrays], task: Task | None = None) -> Any:
    """The predictions of a file for all images in `arrays`, each (B, C, H, W), as one batch; None without images.

    Raises:
        InputError: the images do not fit the network, or its outputs do not fit the task.
    """
    task = task or Classification()
    return joined(task.predictions(file_outputs(session, array)) for array in arrays)


def file_outputs(session: Session, array: FileArrays) -> Any:
    """The outputs of a file for images (N, C, H, W), as the network in torch returns them, but flattened if nested.

    Raises:
        InputError: the images do not fit the network, or an output does not have one entry for each image.
    """
    values = {name: torch.from_numpy(np.array(value)) for name, value in session.run_all(array).items()}
    for name, value in values.items():
        if value.shape[:1] != (len(array),):
            raise InputError(
                f"the output '{name}' of the file has the shape {tuple(value.shape)}; number of images: {len(array)}. "
                "Only networks whose outputs have one entry for each image can be measured."
            )
    if list(values) == [LOGITS]:
        return values[LOGITS]
    if all(_OF_A_TUPLE.fullmatch(name) for name in values):
        return tuple(values.values())
    return values


def targets_of(batches: Batches) -> Any:
    """The targets of all images in order, as one batch; the images are not read."""
    index = torch.arange(len(batches.images)).split(batches.batch_size)
    return joined(batches.images.targets_at(each) for each in index)


def network_score(
    model: nn.Module, batches: Iterable[Batch], task: Task | None = None, original: nn.Module | None = None
) -> float:
    """The task's metric of `model` in eval mode: for a classifier, top-1 accuracy in percent.

    Args:
        model: the network.
        batches: images with targets.
        task: the task of the network; classification by default.
        original: gives the targets of a task that takes them from the original network.

    Raises:
        InputError: a batch has no targets, or there is no image.
    """
    task = task or Classification()
    if not task.from_original:
        return _valid(
            task, task.score((predicted, batch.targets) for batch, predicted in _predicted(model, batches, task))
        )
    assert original is not None
    seen = list(batches)
    return score(task, network_predictions(model, seen, task), network_predictions(original, seen, task))


def score(task: Task, predictions: Any, targets: Any) -> float:
    """The metric of the predictions for all images.

    Raises:
        InputError: the targets do not fit the task, or the metric is not a number.
    """
    return _valid(task, task.score([] if predictions is None else [(predictions, targets)]))


def _valid(task: Task, value: object) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, int | float) or math.isnan(value):
        raise InputError(
            f"the metric {task.metric} is {value!r}, which cannot be compared. Check for NaN in the targets and in "
            "the outputs, and for images whose targets are all ignored; `score` of your own task must return a float."
        )
    return value


def agreement(task: Task, predictions: Any, reference: Any) -> float:
    """Prediction agreement in percent: how much of two predictions for the same images is the same, on average."""
    return 100 * task.agreement(predictions, reference).mean().item()


def joined(batches: Iterable[Any]) -> Any:
    """Predictions or targets of several batches as those of one; None if there is no batch, or a batch has none."""
    every = list(batches)
    if not every or any(each is None for each in every):
        return None
    if isinstance(every[0], list):
        return [image for batch in every for image in batch]
    return tree_map(lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *every)


def _predicted(model: nn.Module, batches: Iterable[Batch], task: Task) -> Iterator[tuple[Batch, Any]]:
    """Each batch with the predictions of `model`, on the CPU."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with evaluating(model):
        for batch in batches:
            with torch.inference_mode():  # not around the loop: the caller runs between batches
                outputs = run(model, batch.images.to(device))
            yield batch, task.predictions(in_float32(outputs))
