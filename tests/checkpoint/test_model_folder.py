"""A network is restored from its weights and its plan, or one error message explains why it cannot be."""

import json
import textwrap

import pytest
import torch
from torch import nn
from torch.nn import utils

import tersor
from tersor.checkpoint import model_folder
from tersor.checkpoint.store import Checkpoints
from tersor.checkpoint.structure import structure
from tersor.core.errors import InputError
from tersor.methods.channel_pruning import ChannelPruning
from tersor.methods.ptq import PTQ
from tersor.methods.weight_pruning import WeightPruning
from tersor.models import build
from tersor.training.context import AttachContext
from tersor.training.method import chain

IMAGES = torch.rand(8, 3, 16, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a pruned, masked and quantized network, and the network itself."""
    torch.manual_seed(0)
    methods = [ChannelPruning(keep_macs=0.6), WeightPruning(sparsity=0.5), PTQ()]
    attached = chain(methods, build("resnet20", 10).eval(), AttachContext(data=[IMAGES]))
    attached.begin()
    path = tersor.save(attached.model, tmp_path_factory.mktemp("saved") / "mine")
    return path, attached.model


def test_a_saved_network_is_loaded_into_a_copy(folder):
    path, model = folder
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "model.safetensors", "structure.json"]
    fresh = build("resnet20", 10)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    again = tersor.load(fresh, path)
    assert torch.equal(again(IMAGES), model(IMAGES))
    assert not again.training
    assert all(torch.equal(before[key], value) for key, value in fresh.state_dict().items())
    assert fresh.state_dict().keys() == before.keys()


def test_an_uncompressed_network_can_be_saved(tmp_path):
    model = build("resnet20", 10).eval()
    again = tersor.load(build("resnet20", 10), tersor.save(model, tmp_path / "plain"))
    assert torch.equal(again(IMAGES), model(IMAGES))


def test_the_example_in_the_docstring_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = textwrap.dedent(model_folder.save.__doc__.split("atomically.")[1].split("    Args:")[0])
    exec(example, {})
    assert (tmp_path / "pruned" / "structure.json").is_file()


def flip(path, name):
    file = path / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: flip(path, "model.safetensors"), "model.safetensors was changed"),
        (lambda path: flip(path, "structure.json"), "structure.json was changed"),
        (lambda path: (path / "structure.json").unlink(), "structure.json is missing"),
        (lambda path: (path / "manifest.json").unlink(), "no manifest.json"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is damaged"),
    ],
)
def test_a_damaged_folder_raises(folder, tmp_path, harm, words):
    path = tersor.save(folder[1], tmp_path / "mine")
    harm(path)
    with pytest.raises(InputError, match=words):
        tersor.load(build("resnet20", 10), path)


@pytest.mark.parametrize(
    "other",
    [
        ("resnet20", 7),
        ("resnet32", 10),
        ("squeezenet1_1", 10),
        pytest.param(("mobilenet_v3_small", 10), marks=pytest.mark.slow),
    ],
)
def test_loading_into_a_different_network_raises(folder, other):
    with pytest.raises(InputError, match=r"does not belong|num_classes"):
        tersor.load(build(*other), folder[0])


class Doubled(nn.Module):
    """A user's own parametrization."""

    def forward(self, weight):
        return 2 * weight


def test_wrong_arguments_and_unsupported_parametrizations_raise(folder, tmp_path):
    path, model = folder
    with pytest.raises(InputError, match="already exists"):
        tersor.save(model, path)
    with pytest.raises(InputError, match="is of type str"):
        tersor.save("resnet20", tmp_path / "new")
    with pytest.raises(InputError, match="is of type str"):
        tersor.load("resnet20", path)
    with pytest.raises(InputError, match=r"nowhere does not exist\. Pass a folder that a run or tersor\.save wrote"):
        tersor.load(build("resnet20", 10), tmp_path / "nowhere")
    strange = nn.Linear(2, 2)
    nn.utils.parametrize.register_parametrization(strange, "weight", Doubled())
    model.register_module("strange", strange)
    try:
        with pytest.raises(InputError, match="which tersor cannot save"):
            tersor.save(model, tmp_path / "new")
    finally:
        del model.strange
    assert not (tmp_path / "new").exists()


def test_the_saved_files_contain_no_code(folder):
    path, _ = folder
    assert json.loads((path / "structure.json").read_text())["cuts"]
    assert (path / "model.safetensors").read_bytes()[8:9] == b"{"


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(784, 2))


def test_the_network_after_a_stage_is_loaded_from_its_checkpoint(tmp_path):
    model = chain([WeightPruning(sparsity=0.5)], small(), AttachContext()).model
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    options = {"step": 3, "done": True, "tensors": tensors, "structure": structure(model), "record": {}}
    path = Checkpoints(tmp_path).save(1, "prune", **options)
    assert torch.equal(tersor.load(small(), path)(IMAGES), model(IMAGES))
    with pytest.raises(InputError, match=r"checkpoint .* belongs to another network"):
        tersor.load(nn.Linear(2, 2), path)
    path = path.rename(tmp_path / "renamed")
    with pytest.raises(InputError, match="is damaged, or its folder was renamed"):
        tersor.load(small(), path)


@pytest.mark.parametrize(
    "norm", [utils.spectral_norm, utils.parametrizations.spectral_norm, utils.parametrizations.weight_norm]
)
def test_a_network_with_normalized_weights_is_loaded(norm, tmp_path):
    def made():
        return nn.Sequential(
            norm(nn.Conv2d(3, 16, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
        )

    images = torch.rand(8, 3, 8, 8)
    for place, network in enumerate((made().eval(), tersor.quantize(made().eval(), images))):
        again = tersor.load(made(), tersor.save(network, tmp_path / str(place)))
        torch.testing.assert_close(again(images), network(images))
