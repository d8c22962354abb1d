"""Warnings of the Python functions about their outcome: layers in float, and classifiers at chance level."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn

from tersor.core.errors import CompressionWarning
from tersor.data.batch import Batch, images_of, parts_of
from tersor.data.network_inputs import NetworkInput
from tersor.evaluation.costs import costs
from tersor.graph.modes import training_notes
from tersor.graph.plain_network import folding_notes
from tersor.quantization.integer_coverage import calibrated_coverage
from tersor.tasks.classification import Classification
from tersor.tasks.task import Task
from tersor.training.teacher_check import COMPRESS_LESS, chance_warning, level_warning

_IMAGES = 128
_MEASURE_ORIGINAL = (
    "Measure the original network. If it is accurate, use more bits or `exclude`; if not, check its weights, mean, std "
    "and image size."
)


def warn_of_quantized(model: fx.GraphModule | nn.Module, batches: Iterable[Any], task: Task) -> None:
    """Warn if a quantized network computes little in integers, or classifies at chance level; called by `quantize`."""
    found = (
        calibrated_coverage(model).warning,
        level_warning("the quantized network", model, _read(batches), task, _IMAGES, _MEASURE_ORIGINAL),
    )
    for sentence in filter(None, found):
        warnings.warn(sentence, CompressionWarning, stacklevel=3)


def warn_of_pruned(original: nn.Module, pruned: nn.Module, images: NetworkInput) -> None:
    """Warn of uncounted MACs and of what a pruned network no longer does in training; called by `prune`.

    Args:
        original: the network before.
        pruned: the captured network without some of its channels.
        images: images for the network.
    """
    one = images[:1].to(next(pruned.parameters()).device)
    for note in (*costs(pruned, one).notes, *folding_notes(original), *training_notes(pruned)):
        warnings.warn(note, CompressionWarning, stacklevel=3)


def warn_of_chance(task: Task, predictions: Mapping[str, Any], targets: Any, outputs: Any) -> None:
    """Warn of the first classifier at chance level; called by `compare_files`.

    Args:
        task: what the files are for.
        predictions: predictions of the files by name, the original first.
        targets: targets of all images, or None.
        outputs: outputs of the original for some images.
    """
    logits = task.logits(outputs) if isinstance(task, Classification) else None
    if logits is None or not isinstance(targets, Tensor):
        return
    classes = max(2, logits.shape[1])
    for place, (name, predicted) in enumerate(predictions.items()):
        advice = (COMPRESS_LESS,) if place else ()
        sentence = chance_warning(name, predicted, targets, classes, *advice)
        if sentence:
            warnings.warn(sentence, CompressionWarning, stacklevel=4)
            return


def _read(batches: Iterable[Any]) -> Iterator[Batch]:
    """A user's batches, with targets where these are whole numbers (N,)."""
    for batch in batches:
        images, (_, found) = images_of(batch), parts_of(batch)
        numbers = isinstance(found, Tensor) and found.shape == (len(images),) and not found.is_floating_point()
        yield Batch(images, found if numbers else None)
