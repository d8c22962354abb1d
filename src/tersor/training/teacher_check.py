"""Signs that a teacher does not teach what it should, in its outputs for a few labelled images before training."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tersor.data.batch import Batch
from tersor.graph.eval_mode import evaluating

IMAGES = 256
"""Labelled images that are looked at, at most."""

_NEAR = 1e-3
_FEWEST = 20
_OF_A_CLASS = 3
_MOVED_IMAGES = 8
_BY_CHANCE = 0.01


@torch.no_grad()
def doubts(name: str, network: nn.Module, batches: Iterable[Batch]) -> list[str]:
    """What speaks against this network as a teacher, a sentence each, with the figure.

    Args:
        name: how a sentence calls it.
        network: returns logits (N, classes) for the images; it stays as it is.
        batches: of which the first 256 images are used; labels that are no class numbers are left aside.
    """
    logits, labels = list[Tensor](), list[Tensor]()
    device = next((each.device for each in network.parameters()), torch.device("cpu"))
    left = IMAGES
    with evaluating(network):
        for batch in batches:
            outputs = network(batch.images[:left].to(device)).float().cpu()
            logits.append(outputs)
            labels.append(torch.full((len(outputs),), -1) if batch.labels is None else batch.labels[:left].cpu())
            left -= len(outputs)
            if left <= 0:
                break
    if not logits:
        return []
    all_logits, all_labels = torch.cat(logits), torch.cat(labels)
    labelled = (all_labels >= 0) & (all_labels < all_logits.shape[1])
    found = [_probabilities(name, all_logits), _accuracy(name, all_logits[labelled], all_labels[labelled])]
    return [sentence for sentence in found if sentence]


def _probabilities(name: str, logits: Tensor) -> str:
    if logits.shape[1] < 2 or not len(logits):
        return ""
    sums = logits.sum(1)
    if (logits >= 0).all() and (sums - 1).abs().max() < _NEAR:
        return (
            f"{name} returns probabilities: its outputs for every image sum to {sums.mean():.3f}. Soft targets need "
            "logits: take the softmax out of its forward."
        )
    logs = logits.logsumexp(1)
    if (logits <= 0).all() and logs.abs().max() < _NEAR:
        return (
            f"{name} returns log-probabilities: the exponentials of its outputs sum to {logs.exp().mean():.3f} for "
            "every image. Methods that compare logits need those: take the log_softmax out of its forward."
        )
    return ""


def _accuracy(name: str, logits: Tensor, labels: Tensor) -> str:
    images, classes = logits.shape
    if images < _FEWEST or classes < 2:
        return ""
    predicted = logits.argmax(1)
    right = int((predicted == labels).sum())
    seen = f"{name}: {100 * right / images:.1f} % of {images} labelled images are predicted as their label"
    moved, by_chance = _moved(predicted, labels, classes), _at_least(right, images, 1 / classes) > _BY_CHANCE
    in_moved = sum(int((labels == label).sum()) for label in moved)
    if moved and (not by_chance or 2 * in_moved >= images):  # a network by chance has a favourite class or two as well
        shown = ", ".join(f"label {label} as class {number}" for label, number in list(moved.items())[:4])
        more = f" and {len(moved) - 4} more" if len(moved) > 4 else ""
        return (
            f"{seen}, and {len(moved)} classes consistently as another one: {shown}{more}. Its classes are probably in "
            "another order than those of the data: compare the lists of classes."
        )
    if by_chance:
        return (
            f"{seen}, not measurably more than by chance ({100 / classes:.1f} % for {classes} classes). Check its "
            "weights, and that mean, std and image size are those that it was trained with."
        )
    return ""


def _moved(predicted: Tensor, labels: Tensor, classes: int) -> dict[int, int]:
    """Label -> the class that most of its images are predicted as, where that is another, and no other label's."""
    mapped: dict[int, int] = {}
    for label in labels.unique().tolist():
        of_label = predicted[labels == label]
        number = int(of_label.mode().values)
        count, images = int((of_label == number).sum()), len(of_label)
        if images >= _OF_A_CLASS and 2 * count > images and _at_least(count, images, 1 / classes) < _BY_CHANCE:
            mapped[label] = number
    targets = list(mapped.values())
    moved = {label: number for label, number in mapped.items() if number != label and targets.count(number) == 1}
    images = sum(int((labels == label).sum()) for label in moved)
    return moved if len(moved) > 1 and images >= _MOVED_IMAGES else {}


def _at_least(right: int, images: int, chance: float) -> float:
    """The probability of `right` or more hits in as many draws as there are `images`."""
    terms = (math.comb(images, hits) * chance**hits * (1 - chance) ** (images - hits) for hits in range(right))
    return 1 - sum(terms)
