"""Networks that fail under bfloat16 autocast are trained in float32."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import tersor
from tersor.core import device
from tersor.core.errors import CompressionWarning
from tersor.training.options import Training
from tersor.training.precision import with_usable_precision

IMAGES = torch.rand(8, 3, 8, 8)
LABELS = torch.arange(8) % 4


class Small(nn.Module):
    """Two convolutions; `function` gets the features of the first one and the images."""

    def __init__(self, function=None):
        super().__init__()
        self.first, self.last, self.function = nn.Conv2d(3, 4, 1), nn.Linear(4, 4), function

    def forward(self, images):
        features = self.first(images)
        if self.function is not None:
            features = self.function(features, images)
        return self.last(features.mean((2, 3)))


def interpolated(features, images):
    return torch.lerp(features, images.mean(1, keepdim=True).expand_as(features), 0.5)


def written(features, _images):
    out = torch.zeros(features.shape, dtype=torch.float32)
    out[:, torch.arange(4)] = features
    return out


@pytest.fixture(autouse=True)
def units(monkeypatch):
    """Simulate a processor with bfloat16 units."""
    monkeypatch.setattr(device, "cpu_flags", lambda: {"amx_bf16"})


@pytest.mark.parametrize("function", [interpolated, written])
def test_a_network_that_fails_in_bfloat16_is_trained_in_float32(function):
    notes = []
    networks = {"the student": Small(), "the teacher": Small(function)}
    chosen = with_usable_precision(Training(), networks, IMAGES, notes.append)
    assert chosen == Training(precision="float32")
    (note,) = notes
    assert note.startswith("the teacher does not run under bfloat16 autocast (")
    assert note.endswith("): training in float32")


@pytest.mark.parametrize("training", [Training(), Training(precision="bfloat16"), Training(precision="float32")])
def test_usable_options_are_not_changed(training):
    network = Small() if training.precision == "auto" else Small(interpolated)
    notes = []
    assert with_usable_precision(training, {"the network": network, "none": None}, IMAGES, notes.append) is training
    assert notes == []


def test_a_network_that_also_fails_in_float32_is_not_changed():
    def fails(_features, _images):
        raise RuntimeError("always")

    notes = []
    assert with_usable_precision(Training(), {"the network": Small(fails)}, IMAGES, notes.append) == Training()
    assert notes == []


def test_distill_warns_and_trains_in_float32():
    student = Small(interpolated)
    before = student.first.weight.clone()
    loader = [(IMAGES, LABELS)] * 2
    with pytest.warns(CompressionWarning, match="the student does not run under bfloat16 autocast") as caught:
        tersor.distill(student, Small(), loader, learning_rate=0.1)
    assert any(each.filename == __file__ for each in caught)
    assert not torch.equal(student.first.weight, before)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*bfloat16")
        tersor.distill(Small(), Small(), loader)
