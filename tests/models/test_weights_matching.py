"""Selecting the network's tensors in a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import prune

from tersor.core.errors import InputError
from tersor.models import load_weights

torch.manual_seed(0)
IMAGES = torch.randn(2, 3, 8, 8)


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()


def pruned_by_torch(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "weight", 0.1)


def below(prefix, tensors):
    return {prefix + key: value for key, value in tensors.items()}


def checkpoint(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


STATE, OTHER = checkpoint(small()), checkpoint(small())
CHECKPOINTS = {
    **{prefix: (below(prefix, STATE), "") for prefix in ("module.", "model.", "backbone.", "module._orig_mod.")},
    "a part compiled": ({key.replace("4.", "4._orig_mod."): value for key, value in STATE.items()}, ""),
    "AveragedModel": ({"n_averaged": torch.tensor(3)} | below("module.", STATE), "under 'module.'"),
    "student": ({**below("student.", STATE), "head.weight": torch.ones(2)}, "under 'student.'"),
    "Lightning": (
        {"state_dict": {**below("model.", STATE), "criterion.weight": torch.ones(2)}, "epoch": 3},
        "'model.'",
    ),
    "the same twice": ({"model": STATE, "model_ema": below("module.", STATE), "optimizer": {"state": {}}}, "['model']"),
    "only one fits": ({"model": {"a": torch.ones(1)}, "ema": {"state_dict": STATE}}, "['ema']['state_dict']"),
    "with numbers": ({"epoch": 3, **STATE}, ""),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_the_weights_are_found_in_the_checkpoint(kind, tmp_path):
    content, taken = CHECKPOINTS[kind]
    torch.save(content, tmp_path / "w.pt")
    network = small()
    loaded_part = load_weights(network, tmp_path / "w.pt").get("taken", "")
    assert (taken in loaded_part) if taken else not loaded_part
    assert all(torch.equal(value, STATE[key]) for key, value in network.state_dict().items())


def orthogonal():
    network = small()
    utils.parametrizations.orthogonal(network[4])
    return network


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"state_dict": STATE, "state_dict_ema": OTHER},
            r"\['state_dict'\], checkpoint\['state_dict_ema'\]\. Save one",
        ),
        ({**below("student.", STATE), **below("teacher.", OTHER)}, r"under 'student\.', .*startswith\('teacher\.'\)"),
        ({**STATE, "criterion.weight": torch.ones(2)}, "1 unexpected: criterion.weight"),
        (orthogonal().state_dict(), "remove_parametrizations"),
    ],
)
def test_ambiguous_checkpoints_raise(content, words, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match=words):
        load_weights(small(), tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "norm",
    [
        utils.weight_norm,
        lambda layer: utils.weight_norm(layer, dim=None),
        utils.parametrizations.weight_norm,
        utils.spectral_norm,
        utils.parametrizations.spectral_norm,
        pruned_by_torch,
    ],
)
def test_weights_under_a_norm_are_folded_into_a_plain_network(norm, tmp_path):
    def build():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Flatten(), nn.Linear(256, 5))

    network, plain = build(), build().eval()
    for place in (0, 1, 3):
        norm(network[place])
    network(IMAGES)
    torch.save({"state_dict": below("module.", network.state_dict())}, tmp_path / "w.pt")
    load_weights(plain, tmp_path / "w.pt")
    torch.testing.assert_close(plain(IMAGES), network.eval()(IMAGES), atol=1e-5, rtol=1e-5)
