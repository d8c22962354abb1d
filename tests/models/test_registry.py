from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.models import build, names
from tersor.models.cifar_resnet import CifarResNet
from tersor.models.libraries import from_library, is_of_library


def network(num_classes: int = 3) -> nn.Module:
    return nn.Linear(2, num_classes)


def fixed() -> nn.Module:
    return nn.Linear(2, 5)


def no_network() -> str:
    return "a word"


def test_cifar_names_build_our_networks_and_others_those_of_torchvision():
    assert isinstance(build("resnet20"), CifarResNet)
    assert isinstance(build("resnet110", 100), CifarResNet)
    resnet18 = build("resnet18", 7)
    assert type(resnet18).__module__ == "torchvision.models.resnet"
    assert resnet18.fc.out_features == 7
    assert build("squeezenet1_1").classifier[1].out_channels == 1000


def test_listed_names_can_be_built():
    known = names()
    assert {"resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet18", "mobilenet_v2"} <= set(known)
    assert len(known) == len(set(known))
    assert not [name for name in known if "rcnn" in name or "quantized" in name or "r3d" in name]
    with torch.device("meta"):
        assert all(isinstance(build(name), nn.Module) for name in ("resnet44", "vit_b_16", "swin_t", "maxvit_t"))


def test_auxiliary_heads_are_removed():
    model = build("inception_v3", 4).train()
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 4)


def test_a_function_gets_num_classes_if_it_accepts_the_argument():
    assert build(f"{__name__}:network", 9).out_features == 9
    assert build(f"{__name__}:network").out_features == 3
    assert build(f"{__name__}:fixed", 9).out_features == 5


@pytest.mark.parametrize(
    ("name", "num_classes", "words"),
    [
        ("resnt20", None, r"unknown model 'resnt20'. Did you mean 'resnet20'\?"),
        ("mobilnet_v2", 10, r"Did you mean 'mobilenet_v2'\?"),
        ("resnet20", 0, "num_classes is 0"),
        (f"{__name__}:no_network", None, "returned a value of type str"),
        (f"{__name__}:netwrok", None, r"Did you mean 'network'\?"),
        ("torch.nn:Linear", 10, "in_features"),
    ],
)
def test_invalid_names_raise(name, num_classes, words):
    with pytest.raises(InputError, match=words):
        build(name, num_classes)


def test_networks_of_torchvision_and_timm_have_random_weights_and_the_requested_classes(monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_args, **_options: pytest.fail("a download"))
    assert from_library("timm:resnet10t", 7).fc.out_features == 7
    assert from_library("timm:resnet10t").fc.out_features == 1000
    with torch.device("meta"):
        segmenting = from_library("torchvision:fcn_resnet50", 4)
    assert segmenting.classifier[-1].out_channels == 4
    with pytest.raises(InputError, match=r"unknown timm model 'resnet10'"):
        from_library("timm:resnet10")
    assert is_of_library("timm:resnet10t")
    assert not is_of_library("package.module:function")


class Configured(nn.Linear):
    """A network from a library like transformers."""

    config_class = SimpleNamespace(from_dict=lambda given: SimpleNamespace(**given))

    def __init__(self, config):
        if config.width < 0:
            raise ValueError("width must be positive.\nAnd more.")
        super().__init__(config.width, config.num_labels)


@pytest.fixture
def library(monkeypatch, tmp_path):
    module = ModuleType("transformers")
    module.Configured, module.configure = Configured, lambda: None
    monkeypatch.setitem(sys.modules, "transformers", module)
    (tmp_path / "config.json").write_text(json.dumps({"width": 3, "num_labels": 2}))
    (tmp_path / "other.json").write_text(json.dumps({"width": -3, "num_labels": 2}))
    return tmp_path


def test_a_network_of_transformers_is_built_from_its_configuration(library):
    assert from_library(f"hf:Configured:{library}").out_features == 2
    assert from_library(f"hf:Configured:{library / 'config.json'}", 5).out_features == 5
    assert from_library(f"hf:Configured:{library}", 5).in_features == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Configurd:{}", r"no network class 'Configurd'. Did you mean 'Configured'\?"),
        ("configure:{}", "no network class 'configure'"),
        ("Configured", "needs the configuration of the network. Write hf:Configured:FOLDER"),
        ("Configured:{}/missing", "needs the configuration"),
        ("Configured:{}/other.json", r"Configured cannot be built from .*other.json: width must be positive\.$"),
    ],
)
def test_invalid_transformers_networks_raise(library, name, words):
    with pytest.raises(InputError, match=words):
        from_library("hf:" + name.format(library))


def test_a_missing_library_is_named_in_the_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="is for networks of timm, which is not installed"):
        from_library("timm:resnet10t")
