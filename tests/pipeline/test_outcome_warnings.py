"""Warnings about classifiers at chance level, from `quantize`, `compare` and `run`."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

import tersor
from tersor import models
from tersor.core.errors import CompressionWarning
from tersor.pipeline import outcome_warnings, run
from tersor.pipeline.setup import prepare
from tersor.recipe import parse
from tersor.tasks.classification import CLASSIFICATION

LABELS = torch.arange(60) % 3
IMAGES = torch.zeros(60, 3, 8, 8)
IMAGES[torch.arange(60), LABELS] = 1
IMAGES += 0.1 * torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(0))


def network(scale):
    """The class is the brightest channel with `scale` 1; with 0, all logits are constant."""
    convolution = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        convolution.weight.copy_(scale * torch.eye(3)[:, :, None, None])
        convolution.bias.copy_(torch.tensor([0.0, 0.5, 0.0]) * (1 - scale))
    return nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def warnings_of(function, *arguments, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*arguments, **options)
    found = [each for each in caught if issubclass(each.category, CompressionWarning)]
    return [str(each.message) for each in found if re.search(r"labeled|same logits", str(each.message))]


@pytest.mark.parametrize(
    ("scale", "labels", "words"),
    [
        (1.0, LABELS, []),
        (0.0, LABELS, ["the quantized network returns the same logits for all 60 images"]),
        (0.0, None, ["the quantized network returns the same logits for all 60 images"]),
        (1.0, LABELS.roll(1), []),
        (1.0, LABELS[torch.randperm(60, generator=torch.Generator().manual_seed(1))], ["% of 60 labeled images"]),
    ],
)
def test_quantize_warns_at_chance_level(scale, labels, words):
    batch = (IMAGES,) if labels is None else (IMAGES, labels)
    found = warnings_of(tersor.quantize, network(scale), [batch])
    if labels is not None and torch.equal(labels, LABELS.roll(1)):
        assert "order of its classes" in found[0]
        return
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))
    assert all(" Measure the original network. If it is accurate, use more bits" in sentence for sentence in found)


def test_the_warning_names_the_first_file_at_chance_level():
    constant, right, logits = torch.zeros(60, dtype=torch.int64), LABELS, torch.zeros(2, 3)
    warn = outcome_warnings.warn_of_chance
    (found,) = warnings_of(warn, CLASSIFICATION, {"original": constant, "artifact": constant}, LABELS, logits)
    assert found.startswith("original: 33.3 % of 60 labeled images are classified correctly: class 0 is predicted for")
    assert found.endswith("image size are those it was trained with.")
    (found,) = warnings_of(warn, CLASSIFICATION, {"original": right, "artifact": constant}, LABELS, logits)
    assert found.startswith("artifact: 33.3 %")
    assert found.endswith("Compress less, train longer, or fine-tune with a smaller learning rate.")
    assert not warnings_of(warn, CLASSIFICATION, {"original": right, "artifact": right}, LABELS, logits)
    assert not warnings_of(warn, CLASSIFICATION, {"original": constant}, None, logits)


def test_compare_warns_at_chance_level(tmp_path, monkeypatch):
    path = tmp_path / "dead.onnx"
    tersor.export(network(0.0), IMAGES[:1], path)
    assert warnings_of(tersor.compare, network(0.0), path, [(IMAGES, LABELS)], seconds=0.01)[0].startswith(
        "original: 33.3 %"
    )


class Lines:
    def __init__(self):
        self.lines = []

    def start(self, task, total):
        pass

    def advance(self, items=1, **values):
        pass

    def say(self, line):
        self.lines.append(line)


def dead(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


def test_a_run_warns_about_a_model_at_chance_level_before_training(tmp_path):
    torch.manual_seed(0)
    models.save_weights(dead(10), tmp_path / "dead.safetensors")
    recipe = parse(
        f"""\
model: {{name: "test_outcome_warnings:dead", weights: {tmp_path / "dead.safetensors"}}}
data: {{name: digits, limit: 64}}
stages:
  - {{name: quantize, methods: [ptq]}}
""",
        "recipe.yaml",
    )
    progress = Lines()
    experiment = prepare(recipe, model=None, data=None, progress=progress)
    (found,) = [line for line in progress.lines if "labeled images" in line]
    assert found.startswith("warning: test_outcome_warnings:dead: ")
    assert "of 64 labeled images are classified correctly" in found
    test = experiment.batches(experiment.data.test, 500)
    artifact = run._level(experiment, test, torch.zeros(len(test.images), dtype=torch.int64))
    assert re.match(
        r"model.onnx: \d+\.\d % of 359 labeled images .* class 0 is predicted for all .* Compress less", artifact
    )
