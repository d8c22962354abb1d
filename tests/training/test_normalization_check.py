"""A check whether images are normalized with the values used in the training of a network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tersor.data.batch import Batch
from tersor.tasks.classification import CLASSIFICATION
from tersor.tasks.regression import Regression
from tersor.training.normalization_check import normalization_warning

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
DATA = (0.3, 0.3, 0.3), (0.2, 0.2, 0.2)


class Brightness(nn.Module):
    """Classifies images, normalized with `mean` and `std`, by their mean value in [0, 1]: four classes."""

    def __init__(self, mean, std):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.mean, self.std = torch.tensor(mean).reshape(-1, 1, 1), torch.tensor(std).reshape(-1, 1, 1)

    def forward(self, images):
        value = (images * self.std + self.mean).mean((1, 2, 3))
        return -(4 * value[:, None] - 0.5 - torch.arange(4)).abs() * self.weight


def batches(mean, std, *, labeled=True, channels=3):
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(160) % 4
    pixels = ((labels + 0.5) / 4)[:, None, None, None] + 0.02 * torch.randn(160, channels, 4, 4, generator=draw)
    images = (pixels - torch.tensor(mean).reshape(-1, 1, 1)) / torch.tensor(std).reshape(-1, 1, 1)
    return [
        Batch(part, targets if labeled else None)
        for part, targets in zip(images.split(40), labels.split(40), strict=True)
    ]


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        (NONE, "but 100.0 % with mean 0 0 0 and std 1 1 1. Give the mean and std that it was trained with."),
        (IMAGENET, "but 100.0 % with mean 0.485 0.456 0.406 and std 0.229 0.224 0.225. Give the mean"),
    ],
)
def test_a_better_common_normalization_causes_a_warning(trained, words):
    found = normalization_warning("net", Brightness(*trained), batches(*DATA), CLASSIFICATION, *DATA)
    assert found.startswith("net classifies ")
    assert " of 128 images correctly with mean 0.3 0.3 0.3 and std 0.2 0.2 0.2, " in found
    assert words in found


def test_gray_images_are_checked():
    gray = (0.3,), (0.2,)
    network = Brightness((0.0,), (1.0,))
    found = normalization_warning("net", network, batches(*gray, channels=1), CLASSIFICATION, *gray)
    assert "with mean 0 and std 1. Give" in found


def test_no_warning_for_the_right_normalization_or_without_a_classifier():
    for values in (NONE, IMAGENET, DATA):
        assert not normalization_warning("net", Brightness(*values), batches(*values), CLASSIFICATION, *values)
    unlabeled = batches(*DATA, labeled=False)
    assert not normalization_warning("net", Brightness(*NONE), unlabeled, CLASSIFICATION, *DATA)
    assert not normalization_warning("net", Brightness(*NONE), batches(*DATA), Regression(), *DATA)
    assert not normalization_warning("net", Brightness(*NONE), batches(*DATA), CLASSIFICATION, None, None)
    torch.manual_seed(0)
    untrained = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    assert not normalization_warning("net", untrained, batches(*DATA), CLASSIFICATION, *DATA)
