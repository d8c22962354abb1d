"""Warnings about a teacher, from its outputs."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from tersor import tasks
from tersor.data.batch import Batch
from tersor.tasks.classification import CLASSIFICATION
from tersor.training.teacher_check import (
    _accuracy,
    _binomial_tail,
    _swapped_classes,
    chance_warning,
    level_warning,
    teacher_warnings,
)

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
    "by chance": (torch.randn(40, 10), r"% of 40 labeled images .* by chance \(10.0 % for 10 classes\)"),
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


def test_images_without_labels_are_only_checked_for_probabilities():
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


def test_the_binomial_tail_equals_that_of_scipy():
    for correct, images, chance in ((0, 5, 0.3), (1, 5, 0.3), (7, 40, 0.1), (40, 40, 0.9)):
        assert _binomial_tail(correct, images, chance) == pytest.approx(stats.binom.sf(correct - 1, images, chance))


def test_the_first_256_images_are_used():
    labels = torch.arange(200) % 10
    seen = []

    class Recording(Fixed):
        def forward(self, images):
            seen.append(len(images))
            return super().forward(images)

    teacher = Recording(torch.zeros(200, 10))
    (warning,) = teacher_warnings("t", teacher, [Batch(torch.zeros(200, 3, 2, 2), labels)] * 3)
    assert seen == [200, 56]
    assert "10.2 % of 256 labeled images" in warning, "20 and 6 of class 0"


def test_accuracy_is_not_checked_for_too_few_images():
    for count, found in ((19, False), (20, True)):
        labels = torch.arange(count) % 10
        assert bool(_accuracy("t", torch.zeros(count, 10), labels)) is found
    assert _accuracy("t", torch.zeros(40, 1), torch.zeros(40)) == ""


def test_at_most_four_swapped_classes_are_listed():
    labels = torch.arange(60) % 10
    for shifted, more in ((4, False), (5, True), (7, True)):
        order = [*range(1, shifted), 0, *range(shifted, 10)]
        warning = _accuracy("t", F.one_hot(torch.tensor(order)[labels], 10).float(), labels)
        assert f"and {shifted} classes are consistently" in warning
        assert (f" and {shifted - 4} more" in warning) is more
        assert warning.count(" as class ") == 4


def test_a_swap_is_reported_only_with_enough_images():
    # two classes with three images each: too few to tell
    labels = torch.tensor([0] * 3 + [1] * 3 + [2] * 30)
    swapped = torch.tensor([1, 0, 2])
    assert _swapped_classes(swapped[labels], labels, 10) == {}
    labels = torch.tensor([0] * 4 + [1] * 4 + [2] * 30)
    assert _swapped_classes(swapped[labels], labels, 10) == {0: 1, 1: 0}
    assert _swapped_classes(torch.tensor([2, 2, 3])[labels], labels, 10) == {}, "two classes as the same one"
    labels = torch.tensor([0] * 2 + [1] * 20)
    assert _swapped_classes(torch.tensor([5, 6])[labels], labels, 10) == {}, "of two images nothing is said"


def test_the_tail_of_many_images_does_not_overflow():
    assert _binomial_tail(5100, 50000, 0.1) == pytest.approx(stats.binom.sf(5099, 50000, 0.1), rel=1e-6)


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (torch.ones(40, 10), "the network returns the same logits for all 40 images. Check that its weights"),
        (torch.randn(40, 10), "not significantly more than by chance .10.0 % for 10 classes.. Check that its weights"),
        (GOOD * 1e-3 + 5 * torch.eye(10)[3], "10.0 % of 40 .*: class 3 is predicted for all of them. Check that"),
        (GOOD.softmax(1), "^$"),
    ],
)
def test_a_network_at_chance_level_is_reported_with_its_accuracy(logits, words):
    assert re.search(words, level_warning("the network", Fixed(logits), [Batch(IMAGES, LABELS)], CLASSIFICATION))


def test_constant_logits_are_reported_without_labels():
    assert "same logits" in level_warning("n", Fixed(torch.ones(40, 10)), [Batch(IMAGES)], CLASSIFICATION)
    assert not level_warning("n", Fixed(torch.ones(40, 10)), [Batch(IMAGES, LABELS)], tasks.build("regression"))


def test_labels_of_one_class_and_rare_classes_cause_no_warning():
    assert not chance_warning("n", torch.zeros(40), torch.zeros(40), 10)
    rare = torch.zeros(40, dtype=torch.int64)
    rare[:9] = 1
    assert not chance_warning("n", torch.zeros(40), rare, 2)
    rare[9] = 1
    assert "75.0 % of 40 labeled images are classified correctly: class 0 is predicted for all" in chance_warning(
        "n", torch.zeros(40), rare, 2
    )


def test_labels_that_are_not_class_indices_cause_no_warning_about_chance():
    embeddings, people = torch.randn(40, 10), torch.arange(40) % 13
    assert not level_warning("n", Fixed(embeddings), [Batch(IMAGES, people)], CLASSIFICATION)
    assert "order of its classes" in level_warning("n", Fixed(GOOD), [Batch(IMAGES, LABELS + 1)], CLASSIFICATION)
