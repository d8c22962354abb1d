"""The verbs leave what they are given as it was."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import tersor
from tersor.core.errors import InputError
from tersor.evaluate import _refuse_other_classes
from tersor.measure import costs
from tersor.zoo import build

IMAGES = torch.rand(16, 3, 16, 16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build("resnet20", 10)


@pytest.fixture
def loader():
    return DataLoader(TensorDataset(IMAGES, torch.randint(10, (16,))), 8)


def test_prune_gives_a_smaller_network_and_leaves_the_one_given(model):
    before = copy.deepcopy(model.state_dict())
    pruned = tersor.prune(model, IMAGES, keep_macs=0.5)
    assert costs(pruned, IMAGES[:1]).macs <= 0.5 * costs(model, IMAGES[:1]).macs
    assert pruned(IMAGES).shape == (16, 10)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_quantize_leaves_the_network_also_when_it_fails(model, loader):
    keys = list(model.state_dict())
    with pytest.raises(InputError, match="without a single image"):
        tersor.quantize(model, [])
    quantized = tersor.quantize(model, loader)
    assert list(model.state_dict()) == keys
    assert list(quantized.state_dict()) != keys
    assert model.training


def test_distill_leaves_the_teacher_as_it_was(model, loader):
    teacher = copy.deepcopy(model)
    tersor.distill(model, teacher, loader)
    assert teacher.training
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(InputError, match="one network"):
        tersor.distill(model, model, loader)


def test_other_classes_are_told():
    _refuse_other_classes(["cat", "dog"], ["cat", "dog"])
    with pytest.raises(InputError, match=r"lacks cat; .* does not know cow"):
        _refuse_other_classes(["cat", "dog"], ["cow", "dog"])
