"""Notes about training behavior that a plain copy loses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import tersor
from recorded_progress import RecordedProgress
from tersor.core.errors import CompressionWarning
from tersor.graph.plain_network import folding_notes
from tersor.pipeline.setup import prepare
from tersor.recipe import parse

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(change=lambda layer: layer):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), change(nn.Conv2d(8, 8, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    )


def normed(num_classes):
    assert num_classes == 10
    return network(parametrizations.weight_norm)


@pytest.mark.parametrize("change", [parametrizations.weight_norm, parametrizations.spectral_norm, spectral_norm])
def test_a_folded_norm_is_noted(change):
    (note,) = folding_notes(network(change))
    assert note.startswith("2: its reparametrization (weight_norm, ")


def test_an_applied_mask_is_noted():
    (note,) = folding_notes(network(lambda layer: prune.random_unstructured(layer, "weight", 0.5)))
    assert note.startswith("2: the mask of torch.nn.utils.prune was applied")


def test_a_plain_network_has_no_notes():
    assert folding_notes(network()) == []


def test_prune_warns_about_a_folded_norm():
    with pytest.warns(CompressionWarning, match=r"2: its reparametrization .* is trained without it"):
        tersor.prune(network(weight_norm).eval(), IMAGES, keep_macs=0.6, round_to=1)


def test_a_run_notes_a_folded_norm():
    progress = RecordedProgress()
    recipe = "model: {name: 'test_plain_network:normed'}\ndata: {name: digits, limit: 32}\nstages:\n"
    recipe += "  - {name: train, methods: [ptq]}\n"
    prepare(parse(recipe, "recipe.yaml"), model=None, data=None, progress=progress)
    assert sum("2: its reparametrization" in each for each in progress.lines) == 1
