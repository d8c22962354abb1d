from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tersor.graph.batchnorm import freezable, make_freezable


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5))


IMAGES = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(1))


def test_a_freezable_batchnorm_behaves_like_the_original_until_it_is_frozen():
    model = network()
    other = copy.deepcopy(model)
    parameters = {id(parameter) for parameter in model.parameters()}
    assert len(make_freezable(model)) == 2
    assert {id(parameter) for parameter in model.parameters()} == parameters
    assert torch.equal(model.train()(IMAGES), other.train()(IMAGES))
    assert torch.equal(model[1].running_mean, other[1].running_mean)
    assert torch.equal(model.eval()(IMAGES), other.eval()(IMAGES))


def test_a_frozen_batchnorm_stays_in_eval_mode_while_the_network_trains():
    model = network()
    for norm in make_freezable(model):
        norm.freeze()
    before = copy.deepcopy(model.state_dict())
    expected = model.eval()(IMAGES)
    assert torch.equal(model.train()(IMAGES), expected)
    assert model.training
    assert not model[1].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model(IMAGES).sum().backward()
    assert model[1].bias.grad is not None


def test_the_state_dict_records_freezing():
    saved = network()
    make_freezable(saved)[0].freeze()
    fresh = network()
    make_freezable(fresh)
    fresh.train().load_state_dict(saved.state_dict())
    assert [fresh[1].training, fresh[4].training] == [False, True]


def test_freezable_is_idempotent_and_skips_norms_without_statistics():
    norm = nn.BatchNorm2d(3)
    assert freezable(freezable(norm)) is not norm
    first = freezable(norm)
    assert freezable(first) is first
    assert make_freezable(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))) == ()


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_a_copy_has_its_own_statistics(kind):
    model = nn.Sequential(kind(3))
    make_freezable(model)
    other = copy.deepcopy(model)
    other[0].running_mean.add_(1)
    assert not torch.equal(other[0].running_mean, model[0].running_mean)
