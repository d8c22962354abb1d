import copy

import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.core.method import chain
from tersor.measure import costs
from tersor.methods.channel_pruning import ChannelPruning
from tersor.methods.ptq import PTQ
from tersor.methods.weight_pruning import WeightPruning
from tersor.zoo import build

IMAGES = torch.rand(8, 3, 16, 16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build("resnet20", 10).eval()


def attached(model, **options):
    return ChannelPruning(**options).attach(model, data=[IMAGES])


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("kind", ["macs", "parameters"])
def test_no_more_stays_than_was_asked(model, scope, kind):
    before = costs(model, IMAGES[:1])
    after = costs(attached(model, scope=scope, **{f"keep_{kind}": 0.6}).model, IMAGES[:1])
    left = getattr(after, kind) / getattr(before, kind)
    assert 0.4 < left <= 0.6


def test_widths_are_rounded_and_none_falls_below_the_floor(model):
    pruned = attached(model, keep_channels=0.4, round_to=4, floor=0.3).model
    widths = {
        name: pruned.get_submodule(name).out_channels
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
    }
    assert all(width % 4 == 0 for width in widths.values())
    assert widths["layer3.1.conv1"] >= 0.3 * 64
    inner = [width for name, width in widths.items() if name.endswith(".conv1")]
    assert sum(inner) <= 0.5 * 3 * (16 + 32 + 64)
    assert 0.3 * 16 <= widths["conv1"] < 16, "the residual stream too, zeros that pad it and all"
    assert pruned(IMAGES).shape == (8, 10)


def test_the_channels_that_go_are_the_smallest(model):
    weight = model.layer1[0].conv1.weight.data
    small = torch.arange(1, 16, 2)
    weight[small] *= 0.01
    model.layer1[0].conv2.weight.data[:, small] *= 0.01
    kept = weight[0::2].clone()
    pruned = attached(model, keep_channels=0.5, exclude=("bn1", "layer*.bn2")).model
    assert torch.equal(pruned.get_submodule("layer1.0.conv1").weight, kept)


def test_statistics_are_those_of_the_network_that_is_left(model):
    result = attached(model, keep_macs=0.6)
    for _ in result.begin():
        pass
    norm = result.model.get_submodule("layer1.0.bn1")
    inputs = []
    hook = norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    reference = copy.deepcopy(result.model)
    result.model.train()(IMAGES)
    hook.remove()
    assert torch.allclose(reference.get_submodule("layer1.0.bn1").running_mean, inputs[0].mean((0, 2, 3)), atol=1e-5)
    assert norm.momentum == 0.1


def test_keeping_all_changes_nothing(model):
    before = model(IMAGES)
    result = attached(model, keep_macs=1.0)
    for _ in result.begin():
        pass
    assert torch.equal(result.model(IMAGES), before)


def test_what_stays_whole_is_said(model):
    notes = attached(model, keep_macs=0.6).notes
    assert "left whole: the channels of linear, since they are the answers" in notes


def test_pruned_then_quantized(model):
    result = chain([ChannelPruning(keep_macs=0.6), PTQ()], model, data=[IMAGES])
    for _ in result.begin():
        pass
    assert result.model(IMAGES).isfinite().all()


def test_mistakes_are_told(model):
    with pytest.raises(InputError, match="one target"):
        attached(model, keep_macs=0.5, keep_channels=0.5)
    with pytest.raises(InputError, match="needs images"):
        ChannelPruning().attach(model)
    with pytest.raises(InputError, match=r"cannot be met: 0\.\d+ stay"):
        attached(model, keep_macs=0.01)
    with pytest.raises(InputError, match="no channel"):
        attached(model, exclude=("layer*",))
    masked = WeightPruning().attach(copy.deepcopy(model)).model
    with pytest.raises(InputError, match="before"):
        attached(masked)


def test_what_is_left_trains_also_when_it_was_trained_before(model):
    model.train()(IMAGES).square().mean().backward()
    result = attached(model, keep_macs=0.6)
    for _ in result.begin():
        pass
    before = result.model.get_submodule("layer1.0.conv1").weight.clone()
    optimizer = torch.optim.SGD(result.model.parameters(), lr=0.1)
    result.model.train()(IMAGES).square().mean().backward()
    optimizer.step()
    assert not torch.equal(result.model.get_submodule("layer1.0.conv1").weight, before)
