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
from tersor.report.analysis.predictions import compare_predictions, png, soft_targets


def images_of(labels):
    count = len(labels)
    pixels = torch.arange(count * 4 * 4 * 3, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(count, 4, 4, 3)
    return Pixels(pixels, torch.tensor(labels))


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


def test_changed_predictions_are_counted():
    images = images_of([0, 0, 1, 1, 2, 2])
    result = compare_predictions(images, np.array([0, 0, 0, 1, 0, 2]), np.array([0, 1, 1, 1, 1, 1]))
    assert result["agreement"] == pytest.approx(100 * 2 / 6)
    assert (result["lost"], result["gained"], result["other"]) == (2, 1, 1)
    assert result["classes"] == [
        {"class": 0, "images": 2, "before": 2, "after": 1},
        {"class": 1, "images": 2, "before": 1, "after": 2},
        {"class": 2, "images": 2, "before": 1, "after": 0},
    ]
    assert result["changes"] == [[0, 1, 3], [2, 1, 1]]
    assert [each["index"] for each in result["examples"]] == [1, 2, 4, 5], "lost, gained, other, and the rest"
    assert [(each["label"], each["before"], each["after"]) for each in result["examples"]] == [
        (0, 0, 1),
        (1, 0, 1),
        (2, 0, 1),
        (2, 2, 1),
    ]
    pixels = images.take(torch.tensor([2]))[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(decoded(result["examples"][1]["png"]), pixels)


def test_examples_of_each_kind_are_taken_from_the_whole_set():
    labels = np.repeat([0, 1, 2, 3], 50)
    before, after = labels.copy(), labels.copy()
    before[100:102] = 3  # gained
    after[:100] = 3  # lost
    after[150:] = 0  # lost
    result = compare_predictions(images_of(labels.tolist()), before, after)
    shown = [each["index"] for each in result["examples"]]
    assert len(shown) == len(set(shown)) == 24
    assert {100, 101} <= set(shown)
    assert {0, 199} <= set(shown)


def test_equal_predictions_give_no_changes_and_no_examples():
    result = compare_predictions(images_of([0, 1]), np.array([1, 1]), np.array([1, 1]))
    assert result["agreement"] == 100
    assert result["examples"] == result["changes"] == []


class Fixed(nn.Module):
    """Logits that depend on the image: the brighter, the more confident."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images):
        return images.mean((1, 2, 3))[:, None] * torch.arange(self.classes)[None]


def test_soft_targets_are_softmax_of_logits_divided_by_temperature():
    labels = list(range(9))
    pixels = torch.arange(9, dtype=torch.uint8).reshape(9, 1, 1, 1).expand(9, 2, 2, 3).contiguous()
    test = Batches(Pixels(pixels, torch.tensor(labels)), 4, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))
    result = soft_targets(Fixed(3), test, torch.tensor([8, 1, 0, 5]))
    assert [image["index"] for image in result] == [8, 5, 1, 0], "from the most to the least confident"
    assert [image["label"] for image in result] == [8, 5, 1, 0]
    for image in result:
        assert image["classes"] == [0, 1, 2]
        for row in image["rows"]:
            weights = [math.exp(image["index"] * number / row["temperature"]) for number in range(3)]
            expected = [weight / sum(weights) for weight in weights]
            assert row["probabilities"] == pytest.approx(expected, abs=1e-4)
            entropy = -sum(value * math.log2(value) for value in expected)
            assert row["entropy"] == pytest.approx(entropy, abs=1e-3)
    assert [row["temperature"] for row in result[0]["rows"]] == [1, 2, 4, 8, 16]
    assert decoded(result[0]["png"]).tolist() == np.full((2, 2, 3), 8).tolist()


def test_of_many_classes_only_the_most_likely_are_listed():
    pixels = torch.full((1, 2, 2, 3), 3, dtype=torch.uint8)
    test = Batches(Pixels(pixels, torch.tensor([0])), 1, mean=(0, 0, 0), std=(1, 1, 1))
    [result] = soft_targets(Fixed(40), test, torch.tensor([0]))
    assert result["classes"] == list(range(39, 27, -1))
    assert len(result["rows"][0]["probabilities"]) == 12


def test_large_images_are_downsized():
    assert decoded(png(torch.zeros(3, 300, 150, dtype=torch.uint8))).shape == (96, 48, 3)
