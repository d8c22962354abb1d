"""What removed channels gave on average is given by the biases behind."""

import copy

import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.graph.capture import capture
from tersor.graph.channels import coupled_channels, merged, remove
from tersor.graph.constants import fold, lost_by_readers

IMAGES = torch.randn(16, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def net(*behind, width=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), *behind).eval()


def pooled(width):
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)


def cut(model, channels, *, folded=True):
    """Channels of the first convolution removed, and folded or not."""
    graph = capture(copy.deepcopy(model))
    groups, _ = coupled_channels(graph, IMAGES)
    (group,) = [group for group in groups if group.root == "0"]
    cuts = merged(group.cuts(channels))
    found = drained(lost_by_readers(graph, cuts, [IMAGES[:6], IMAGES[6:]], 16)) if folded else {}
    remove(graph, cuts)
    fold(graph, found)
    return graph


def drained(steps):
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def kill(model, channels):
    """Factor 0, so that what is sent on is the constant max(beta, 0)."""
    model[1].weight.data[list(channels)] = 0
    model[1].bias.data[list(channels)] = torch.tensor([0.7, 1.3])
    return model


@pytest.mark.parametrize(
    "behind",
    [
        pooled(6),
        (nn.Conv2d(6, 5, 3), nn.ReLU(), *pooled(5)),
        (nn.Conv2d(6, 5, 3, stride=2, dilation=2, bias=False), nn.BatchNorm2d(5), nn.ReLU(), *pooled(5)),
        (nn.Flatten(), nn.Linear(6 * 64, 4)),
    ],
    ids=["linear", "bias", "batchnorm", "flattened"],
)
def test_a_dead_channel_goes_and_nothing_changes(behind):
    model = kill(net(*behind), (1, 4))
    assert torch.allclose(cut(model, [1, 4])(IMAGES), model(IMAGES), atol=1e-5)
    assert not torch.allclose(cut(model, [1, 4], folded=False)(IMAGES), model(IMAGES), atol=1e-2)


def test_behind_zero_padding_what_is_given_is_the_mean_over_the_positions():
    model = kill(net(nn.Conv2d(6, 5, 3, padding=1)), (1, 4))
    expected = model(IMAGES)
    folded, bare = (cut(model, [1, 4], folded=each)(IMAGES) - expected for each in (True, False))
    assert torch.allclose(folded.mean((0, 2, 3)), torch.zeros(5), atol=1e-5)
    assert folded.square().sum() < 0.5 * bare.square().sum()
    wanted = (bare - bare.mean((0, 2, 3), keepdim=True)).square().sum()  # no constant comes nearer
    assert torch.allclose(folded.square().sum(), wanted, rtol=1e-4)


def test_a_living_channel_is_replaced_by_its_mean():
    model = net(*pooled(6))
    features = model[:5](IMAGES)
    features[:, [0, 2]] = features[:, [0, 2]].mean(0)
    assert torch.allclose(cut(model, [0, 2])(IMAGES), model[5](features), atol=1e-5)


def test_of_a_reader_that_loses_channels_itself_those_that_stay_get_theirs():
    model = kill(net(nn.Conv2d(6, 5, 3), nn.ReLU(), *pooled(5)), (1, 4))
    graph = capture(copy.deepcopy(model))
    groups, _ = coupled_channels(graph, IMAGES)
    roots = {group.root: group for group in groups}
    cuts = merged([*roots["0"].cuts([1, 4]), *roots["3"].cuts([2])])
    lost = drained(lost_by_readers(graph, cuts, [IMAGES], 16))
    assert {name: len(values) for name, values in lost.items()} == {"3": 4, "7": 4}
    dead = copy.deepcopy(model)
    dead[3].weight.data[2], dead[3].bias.data[2] = 0, 0
    given = dead[:6](IMAGES) - 0
    expected = dead[7](given[:, :, 0, 0] if given.ndim == 4 else given)
    remove(graph, cuts)
    fold(graph, {"3": lost["3"]})
    assert torch.allclose(graph(IMAGES), expected, atol=1e-5)


def test_looking_leaves_the_network_as_it_was():
    model = capture(net(*pooled(6)).train())
    (group,) = [group for group in coupled_channels(model, IMAGES)[0] if group.root == "0"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    drained(lost_by_readers(model, group.cuts([0]), [IMAGES], 16))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    with pytest.raises(InputError, match="none were given"):
        drained(lost_by_readers(model, group.cuts([0]), [], 16))
