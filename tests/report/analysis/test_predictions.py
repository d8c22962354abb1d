from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tersor.data import Batches
from tersor.data.image_sets import Pixels
from tersor.report.analysis.predictions import changed_answers, png, softened_targets


def images_of(labels):
    count = len(labels)
    pixels = torch.arange(count * 4 * 4 * 3, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(count, 4, 4, 3)
    return Pixels(pixels, torch.tensor(labels))


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


def test_changed_answers_are_counted():
    images = images_of([0, 0, 1, 1, 2, 2])
    told = changed_answers(images, np.array([0, 0, 0, 1, 0, 2]), np.array([0, 1, 1, 1, 1, 1]))
    assert told["agreement"] == pytest.approx(100 * 2 / 6)
    assert (told["lost"], told["gained"], told["other"]) == (2, 1, 1)
    assert told["classes"] == [
        {"class": 0, "images": 2, "before": 2, "after": 1},
        {"class": 1, "images": 2, "before": 1, "after": 2},
        {"class": 2, "images": 2, "before": 1, "after": 0},
    ]
    assert told["moves"] == [[0, 1, 3], [2, 1, 1]]
    assert [each["index"] for each in told["shown"]] == [1, 2, 4, 5], "lost, gained, other, and the rest"
    assert [(each["label"], each["before"], each["after"]) for each in told["shown"]] == [
        (0, 0, 1),
        (1, 0, 1),
        (2, 0, 1),
        (2, 2, 1),
    ]
    pixels = images.take(torch.tensor([2]))[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(decoded(told["shown"][1]["png"]), pixels)


def test_of_many_changed_answers_some_of_each_kind_are_shown_from_the_whole_set():
    labels = np.repeat([0, 1, 2, 3], 50)
    before, after = labels.copy(), labels.copy()
    before[100:102] = 3  # gained
    after[:100] = 3  # lost
    after[150:] = 0  # lost
    told = changed_answers(images_of(labels.tolist()), before, after)
    shown = [each["index"] for each in told["shown"]]
    assert len(shown) == len(set(shown)) == 24
    assert {100, 101} <= set(shown)
    assert {0, 199} <= set(shown)


def test_nothing_changed():
    told = changed_answers(images_of([0, 1]), np.array([1, 1]), np.array([1, 1]))
    assert told["agreement"] == 100
    assert told["shown"] == told["moves"] == []


class Fixed(nn.Module):
    """Logits that depend on the image: the brighter, the surer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images):
        return images.mean((1, 2, 3))[:, None] * torch.arange(self.classes)[None]


def test_softened_targets_are_softmax_over_t():
    labels = list(range(9))
    pixels = torch.arange(9, dtype=torch.uint8).reshape(9, 1, 1, 1).expand(9, 2, 2, 3).contiguous()
    test = Batches(Pixels(pixels, torch.tensor(labels)), 4, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))
    told = softened_targets(Fixed(3), test, torch.tensor([8, 1, 0, 5]))
    assert [image["index"] for image in told] == [8, 5, 1, 0], "from the surest to the least sure"
    assert [image["label"] for image in told] == [8, 5, 1, 0]
    for image in told:
        assert image["classes"] == [0, 1, 2]
        for row in image["rows"]:
            weights = [math.exp(image["index"] * number / row["temperature"]) for number in range(3)]
            expected = [weight / sum(weights) for weight in weights]
            assert row["probabilities"] == pytest.approx(expected, abs=1e-4)
            entropy = -sum(value * math.log2(value) for value in expected)
            assert row["entropy"] == pytest.approx(entropy, abs=1e-3)
    assert [row["temperature"] for row in told[0]["rows"]] == [1, 2, 4, 8, 16]
    assert decoded(told[0]["png"]).tolist() == np.full((2, 2, 3), 8).tolist()


def test_of_many_classes_the_likeliest_are_told():
    pixels = torch.full((1, 2, 2, 3), 3, dtype=torch.uint8)
    test = Batches(Pixels(pixels, torch.tensor([0])), 1, mean=(0, 0, 0), std=(1, 1, 1))
    [told] = softened_targets(Fixed(40), test, torch.tensor([0]))
    assert told["classes"] == list(range(39, 27, -1))
    assert len(told["rows"][0]["probabilities"]) == 12


def test_large_images_are_made_smaller():
    assert decoded(png(torch.zeros(3, 300, 150, dtype=torch.uint8))).shape == (96, 48, 3)
