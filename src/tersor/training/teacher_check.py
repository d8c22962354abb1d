"""Checks of a network by its outputs for a few images: a teacher, or a network at chance level."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tersor.data.batch import Batch
from tersor.graph.eval_mode import evaluating
from tersor.graph.forward_call import run
from tersor.tasks.classification import CLASSIFICATION, Classification
from tersor.tasks.task import Task

IMAGES = 256
"""Largest number of images that are used."""

COMPRESS_LESS = "Compress less, train longer, or fine-tune with a smaller learning rate."
"""What to do about a network that compression has brought to chance level."""

_SUM_TOLERANCE = 1e-3
_MIN_IMAGES = 20
_MIN_IMAGES_PER_CLASS = 3
_MIN_SWAPPED_IMAGES = 8
_MIN_OTHERS = 10
"""Images of other classes from which on a network that predicts one class alone has not learned from them."""
_SIGNIFICANCE = 0.01
_CHECK = "Check that its weights, mean, std and image size are those it was trained with."


def teacher_warnings(name: str, network: nn.Module, batches: Iterable[Batch], task: Task = CLASSIFICATION) -> list[str]:
    """Reasons why a network may be a bad teacher, one sentence each, with the measured value.

    Args:
        name: the network's name in the sentences.
        network: it is not changed.
        batches: the first 256 images are used; labels that are not class indices are ignored.
        task: only classification is checked, with logits (N, classes).
    """
    found = logits_and_labels(network, batches, task, IMAGES)
    if found is None:
        return []
    logits, labels = found
    labelled = (labels >= 0) & (labels < logits.shape[1])
    warnings = [_probabilities(name, logits), _accuracy(name, logits[labelled], labels[labelled])]
    return [sentence for sentence in warnings if sentence]


def level_warning(
    name: str, network: nn.Module, batches: Iterable[Batch], task: Task, images: int = IMAGES, advice: str = _CHECK
) -> str:
    """A sentence about a classifier at chance level, or with the same logits for all images; "" for any other network.

    Args:
        name: the network's name in the sentence.
        network: it is not changed.
        batches: labels below 0 are ignored. If a label is larger than the number of logits, the outputs are not logits,
            and predictions are not checked.
        task: only classification is checked, with logits (N, classes).
        images: largest number of images to use.
        advice: a sentence that says what to do about chance level, or about equal logits.
    """
    found = logits_and_labels(network, batches, task, images)
    if found is None:
        return ""
    logits, labels = found
    if len(logits) >= _MIN_IMAGES and bool((logits == logits[0]).all()):
        return f"{name} returns the same logits for all {len(logits)} images. {advice}"
    if bool((labels > logits.shape[1]).any()):  # embeddings; one more than the last class are classes from 1
        return ""
    labelled = (labels >= 0) & (labels < logits.shape[1])
    return _accuracy(name, logits[labelled], labels[labelled], advice)


@torch.no_grad()
def logits_and_labels(
    network: nn.Module, batches: Iterable[Batch], task: Task, images: int
) -> tuple[Tensor, Tensor] | None:
    """Logits (N, classes) and labels (N,), -1 where there is none; None without logits."""
    if not isinstance(task, Classification):
        return None
    logits, labels = list[Tensor](), list[Tensor]()
    device = next((each.device for each in network.parameters()), torch.device("cpu"))
    remaining = images
    with evaluating(network):
        for batch in batches:
            outputs = task.logits(run(network, batch.images[:remaining].to(device)))
            if outputs is None or outputs.ndim != 2:
                return None
            logits.append(outputs.float().cpu())
            labels.append(torch.full((len(outputs),), -1) if batch.targets is None else batch.targets[:remaining].cpu())
            remaining -= len(outputs)
            if remaining <= 0:
                break
    return (torch.cat(logits), torch.cat(labels)) if logits else None


def _probabilities(name: str, logits: Tensor) -> str:
    if logits.shape[1] < 2 or not len(logits):
        return ""
    sums = logits.sum(1)
    if (logits >= 0).all() and (sums - 1).abs().max() < _SUM_TOLERANCE:
        return (
            f"{name} returns probabilities: its outputs for every image sum to {sums.mean():.3f}. Soft targets need "
            "logits: remove the softmax from its forward method."
        )
    logs = logits.logsumexp(1)
    if (logits <= 0).all() and logs.abs().max() < _SUM_TOLERANCE:
        return (
            f"{name} returns log-probabilities: the exponentials of its outputs sum to {logs.exp().mean():.3f} for "
            "every image. Methods that compare logits need logits: remove the log_softmax from its forward method."
        )
    return ""


def _accuracy(name: str, logits: Tensor, labels: Tensor, advice: str = _CHECK) -> str:
    return chance_warning(name, logits.argmax(1), labels, logits.shape[1], advice)


def chance_warning(name: str, predicted: Tensor, labels: Tensor, classes: int, advice: str = _CHECK) -> str:
    """A sentence about predictions that are not significantly better than chance, or in another order of the classes.

    Args:
        name: name of the network.
        predicted: class indices (N,).
        labels: class indices (N,). If all are equal, nothing is checked.
        classes: number of classes.
        advice: a sentence that says what to do about chance level.
    """
    images = len(labels)
    if images < _MIN_IMAGES or classes < 2 or bool((labels == labels[0]).all()):
        return ""
    correct = int((predicted == labels).sum())
    accuracy = f"{name}: {100 * correct / images:.1f} % of {images} labeled images are classified correctly"
    swapped, chance = _swapped_classes(predicted, labels, classes), _binomial_tail(correct, images, 1 / classes)
    in_swapped = sum(int((labels == label).sum()) for label in swapped)
    # an untrained network may also prefer a class or two
    if swapped and (chance <= _SIGNIFICANCE or 2 * in_swapped >= images):
        examples = ", ".join(f"label {label} as class {number}" for label, number in list(swapped.items())[:4])
        more = f" and {len(swapped) - 4} more" if len(swapped) > 4 else ""
        return (
            f"{accuracy}, and {len(swapped)} classes are consistently predicted as another class: {examples}{more}. "
            "The order of its classes probably differs from that of the data: compare the lists of classes."
        )
    if images - int((labels == predicted[0]).sum()) >= _MIN_OTHERS and bool((predicted == predicted[0]).all()):
        return f"{accuracy}: class {int(predicted[0])} is predicted for all of them. {advice}"
    if chance > _SIGNIFICANCE:
        return (
            f"{accuracy}, not significantly more than by chance ({100 / classes:.1f} % for {classes} classes). {advice}"
        )
    return ""


def _swapped_classes(predicted: Tensor, labels: Tensor, classes: int) -> dict[int, int]:
    """Return label -> the wrong class that is predicted for most of its images, if no other label has the same one."""
    mapped: dict[int, int] = {}
    for label in labels.unique().tolist():
        classified = predicted[labels == label]
        number = int(classified.mode().values)
        count, images = int((classified == number).sum()), len(classified)
        significant = _binomial_tail(count, images, 1 / classes) < _SIGNIFICANCE
        if images >= _MIN_IMAGES_PER_CLASS and 2 * count > images and significant:
            mapped[label] = number
    targets = list(mapped.values())
    swapped = {label: number for label, number in mapped.items() if number != label and targets.count(number) == 1}
    images = sum(int((labels == label).sum()) for label in swapped)
    return swapped if len(swapped) > 1 and images >= _MIN_SWAPPED_IMAGES else {}


def _binomial_tail(correct: int, images: int, chance: float) -> float:
    """The probability of at least `correct` hits in `images` draws."""
    hits = torch.arange(correct, dtype=torch.float64)
    ways = math.lgamma(images + 1) - torch.lgamma(hits + 1) - torch.lgamma(images - hits + 1)
    return 1 - float((ways + hits * math.log(chance) + (images - hits) * math.log1p(-chance)).exp().sum())
