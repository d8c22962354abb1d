"""Warnings about a teacher, from its outputs."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor import tasks
from tersor.data.batch import Batch
from tersor.training.teacher_check import _accuracy, teacher_warnings

torch.manual_seed(0)
IMAGES = torch.randn(40, 3, 8, 8)
LABELS = torch.arange(40) % 10


class Fixed(nn.Module):
    """Returns fixed logits for the images, in their order."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.weight = logits, nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return self.logits[: len(images)]


GOOD = 10 * torch.eye(10)[LABELS] + torch.randn(40, 10)
SWAPPED = torch.tensor([1, 0, *range(2, 10)])
TEACHERS = {
    "good": (GOOD, None),
    "by chance": (torch.randn(40, 10), r"% of 40 labelled images .* by chance \(10.0 % for 10 classes\)"),
    "softmax": (GOOD.softmax(1), r"sum to 1\.000.*softmax"),
    "log_softmax": (GOOD.log_softmax(1), r"log-probabilities.*1\.000"),
    "rolled": (GOOD.roll(1, 1), "0.0 % of 40 .*10 classes .*label 0 as class 1.*order of its classes probably differs"),
    "two swapped": (GOOD[:, SWAPPED], "80.0 % of 40 .*2 classes .*label 0 as class 1, label 1 as class 0"),
    "one class": (GOOD * 0 + 5 * torch.eye(10)[3], "10.0 % of 40"),
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_warnings_depend_on_the_outputs(kind):
    logits, words = TEACHERS[kind]
    found = teacher_warnings("the teacher", Fixed(logits), [Batch(IMAGES, LABELS)])
    assert len(found) == (words is not None)
    assert words is None or re.search(words, found[0])


def test_random_predictions_of_two_classes_are_not_reported_as_another_order():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(40) % 2
    for _ in range(20):
        found = teacher_warnings("t", Fixed(torch.randn(40, 2, generator=generator)), [Batch(IMAGES, labels)])
        assert not any("order of its classes probably differs" in each for each in found)


def test_images_without_labels_are_checked_only_for_probabilities():
    assert teacher_warnings("t", Fixed(-GOOD), [Batch(IMAGES)]) == []
    assert len(teacher_warnings("t", Fixed(GOOD.softmax(1)), [Batch(IMAGES, LABELS - 20)])) == 1
    assert teacher_warnings("t", Fixed(GOOD), []) == []


def test_two_frequent_classes_of_a_random_network_are_not_reported_as_another_order():
    labels = torch.arange(60) % 10
    predicted = torch.zeros(60, dtype=torch.int64)
    predicted[labels == 1], predicted[labels == 8] = 5, 7
    warning = _accuracy("the teacher", F.one_hot(predicted, 10).float(), labels)
    assert "not significantly more than by chance" in warning
    swapped = _accuracy("the teacher", F.one_hot((labels + 1) % 10, 10).float(), labels)
    assert "order of its classes probably differs" in swapped


def test_only_classifiers_are_checked():
    softmax = GOOD.softmax(1)
    for task in ("regression", "multilabel", "segmentation", "embedding"):
        assert teacher_warnings("t", Fixed(softmax), [Batch(IMAGES, IMAGES)], tasks.build(task)) == []
    assert teacher_warnings("t", Fixed(softmax[:, :, None, None]), [Batch(IMAGES, LABELS)]) == []


def test_logits_among_several_outputs_are_checked():
    class Several(Fixed):
        def forward(self, images):
            return {"logits": super().forward(images), "features": images}

    (warning,) = teacher_warnings("t", Several(GOOD.softmax(1)), [Batch(IMAGES, LABELS)])
    assert "softmax" in warning
