from __future__ import annotations

import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.models import build, names
from tersor.models.cifar_resnet import CifarResNet


def network(num_classes: int = 3) -> nn.Module:
    return nn.Linear(2, num_classes)


def fixed() -> nn.Module:
    return nn.Linear(2, 5)


def no_network() -> str:
    return "a word"


def test_cifar_names_are_ours_and_others_torchvision_s():
    assert isinstance(build("resnet20"), CifarResNet)
    assert isinstance(build("resnet110", 100), CifarResNet)
    resnet18 = build("resnet18", 7)
    assert type(resnet18).__module__ == "torchvision.models.resnet"
    assert resnet18.fc.out_features == 7
    assert build("squeezenet1_1").classifier[1].out_channels == 1000


def test_names_can_be_built():
    known = names()
    assert {"resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet18", "mobilenet_v2"} <= set(known)
    assert len(known) == len(set(known))
    assert not [name for name in known if "rcnn" in name or "quantized" in name or "r3d" in name]
    with torch.device("meta"):
        assert all(isinstance(build(name), nn.Module) for name in ("resnet44", "vit_b_16", "swin_t", "maxvit_t"))


def test_auxiliary_heads_are_left_out():
    model = build("inception_v3", 4).train()
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 4)


def test_a_function_gets_num_classes_if_it_accepts_it():
    assert build(f"{__name__}:network", 9).out_features == 9
    assert build(f"{__name__}:network").out_features == 3
    assert build(f"{__name__}:fixed", 9).out_features == 5


@pytest.mark.parametrize(
    ("name", "num_classes", "said"),
    [
        ("resnt20", None, r"unknown model 'resnt20'. Did you mean 'resnet20'\?"),
        ("mobilnet_v2", 10, r"Did you mean 'mobilenet_v2'\?"),
        ("resnet20", 0, "num_classes is 0"),
        (f"{__name__}:no_network", None, "returned a value of type str"),
        (f"{__name__}:netwrok", None, r"Did you mean 'network'\?"),
        ("torch.nn:Linear", 10, "in_features"),
    ],
)
def test_messages_for_invalid_names(name, num_classes, said):
    with pytest.raises(InputError, match=said):
        build(name, num_classes)
