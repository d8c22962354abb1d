"""An artifact that is there already, on images of the user's."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tersor.core.errors import InputError
from tersor.core.watch import Unwatched
from tersor.evaluate import evaluate
from tersor.export.onnx import export


def network(classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)).eval()


@pytest.fixture
def images(tmp_path):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for number in range(3):
                Image.fromarray(np.full((8, 8, 3), 60 * number, np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (("cat", "cow"), "lacks cow; the artifact knows no dog"),
        (("cat", "cow", "dog"), r"lacks cow\. Give"),
        (("dog", "cat"), "another order"),
    ],
)
def test_other_classes_are_refused(images, tmp_path, classes, words):
    export(network(len(classes)), torch.rand(1, 3, 8, 8), tmp_path / "model.onnx", classes=classes)
    with pytest.raises(InputError, match=words):
        evaluate(tmp_path / "model.onnx", str(images), None, watch=Unwatched())


def test_the_same_classes_are_not(images, tmp_path):
    export(network(2), torch.rand(1, 3, 8, 8), tmp_path / "model.onnx", classes=("cat", "dog"))
    assert evaluate(tmp_path / "model.onnx", str(images), None, watch=Unwatched()).images == 6
