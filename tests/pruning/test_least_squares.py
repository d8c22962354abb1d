"""The remaining channels reconstruct the outputs of removed channels as well as possible."""

import copy

import pytest
import torch
from torch import nn

import tersor
from tersor.core.errors import InputError
from tersor.graph.capture import capture
from tersor.pruning.channel_groups import coupled_channels, merge_cuts, remove
from tersor.pruning.least_squares import apply_fits, fit_layers

IMAGES = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))
"""So small that a layer after a 3x3 convolution has at most 16 positions, all of which are used."""


def net(*behind, width=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), *behind).eval()


def pooled(width):
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)


def cut(model, channels, *, compensated=True, images=IMAGES):
    """Remove channels of the first convolution, with or without compensation."""
    graph = capture(copy.deepcopy(model), IMAGES)
    (group,) = [group for group in coupled_channels(graph, images)[0] if group.root == "0"]
    cuts = merge_cuts(group.cuts(channels))
    found = fit_layers(graph, cuts, [images[:6], images[6:]], 16) if compensated else {}
    remove(graph, cuts)
    apply_fits(graph, found)
    return graph


def kill(model, channels):
    """Set gamma to 0, so that the output of the channel is the constant max(beta, 0)."""
    model[1].weight.data[list(channels)] = 0
    model[1].bias.data[list(channels)] = torch.tensor([0.7, 1.3])
    return model


@pytest.mark.parametrize(
    "behind",
    [
        pooled(6),
        (nn.Conv2d(6, 5, 3), nn.ReLU(), *pooled(5)),
        (nn.Conv2d(6, 5, 2, stride=2, dilation=2, bias=False), nn.BatchNorm2d(5), nn.ReLU(), *pooled(5)),
        (nn.Flatten(), nn.Linear(6 * 16, 4)),
    ],
    ids=["linear", "bias", "batchnorm", "flattened"],
)
def test_removing_a_dead_channel_changes_no_output(behind):
    model = kill(net(*behind), (1, 4))
    assert torch.allclose(cut(model, [1, 4])(IMAGES), model(IMAGES), atol=1e-5)
    assert not torch.allclose(cut(model, [1, 4], compensated=False)(IMAGES), model(IMAGES), atol=1e-2)


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(6, 5, 3, padding="same", bias=False)])
def test_the_fit_is_the_least_squares_solution(layer):
    model = net(layer, *(() if layer.bias is not None else (nn.BatchNorm2d(5),)))
    wanted, bare = model(IMAGES), cut(model, [0, 2], compensated=False)(IMAGES)
    features = nn.functional.unfold(model[:3](IMAGES)[:, [1, 3, 4, 5]], 3, padding=1).movedim(1, -1).flatten(0, 1)
    features = torch.cat([features, torch.ones(len(features), 1)], 1)
    target = wanted.movedim(1, -1).flatten(0, -2)
    least = (features @ torch.linalg.lstsq(features, target).solution - target).square().sum()
    found = (cut(model, [0, 2])(IMAGES) - wanted).square().sum()
    assert least <= found < 1.01 * least
    by_means_alone = (bare - wanted).movedim(1, 0).flatten(1).var(1, correction=0).sum() * len(target)
    assert found < 0.8 * by_means_alone


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 5, 3, stride=2, padding=1),
        nn.Conv2d(6, 5, (3, 2), dilation=(1, 2), padding=(2, 0)),
        nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"),
        nn.Linear(4, 5),
    ],
    ids=["stride", "dilation", "reflect", "linear"],
)
def test_with_too_few_positions_only_the_mean_is_corrected(layer):
    torch.manual_seed(1)
    if isinstance(layer, nn.Linear):
        layer = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    model = net(*layer) if isinstance(layer, nn.Sequential) else net(layer)
    images, removed = IMAGES[:2], [1, 4]
    given = model[:3](images)
    kept = given.clone()
    kept[:, removed] = 0
    lost = (model[3:](given) - model[3:](kept)).movedim(1, -1).flatten(0, -2).mean(0)
    pruned, bare = cut(model, removed, images=images), cut(model, removed, compensated=False, images=images)
    offset = (pruned(images) - bare(images)).movedim(1, -1).flatten(0, -2)
    assert torch.allclose(offset, lost.expand_as(offset), atol=1e-5)


def test_a_layer_that_also_loses_output_channels_is_fitted():
    model = kill(net(nn.Conv2d(6, 5, 3), nn.ReLU(), *pooled(5)), (1, 4))
    graph = capture(copy.deepcopy(model), IMAGES)
    roots = {group.root: group for group in coupled_channels(graph, IMAGES)[0]}
    cuts = merge_cuts([*roots["0"].cuts([1, 4]), *roots["3"].cuts([2])])
    found = fit_layers(graph, cuts, [IMAGES], 16)
    assert {name: tuple(fit.weight.shape) for name, fit in found.items()} == {"3": (4, 4, 3, 3), "7": (4, 4)}
    dead = copy.deepcopy(model)
    dead[3].weight.data[2], dead[3].bias.data[2] = 0, 0
    remove(graph, cuts)
    apply_fits(graph, {"3": found["3"]})
    assert torch.allclose(graph(IMAGES), dead(IMAGES), atol=1e-5)


def test_fitting_does_not_change_the_network():
    model = capture(net(*pooled(6)).train(), IMAGES)
    (group,) = [group for group in coupled_channels(model, IMAGES)[0] if group.root == "0"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fit_layers(model, group.cuts([0]), [IMAGES], 16)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    with pytest.raises(InputError, match="none were given"):
        fit_layers(model, group.cuts([0]), [], 16)


class Shared(nn.Module):
    """The same convolution is called at two resolutions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.shared = nn.Conv2d(6, 5, 1)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.shared(x).mean((2, 3)) + self.shared(nn.functional.avg_pool2d(x, 2)).mean((2, 3))


def test_a_layer_called_at_several_resolutions_is_fitted_to_all_of_them_at_once():
    torch.manual_seed(0)
    graph = capture(Shared().eval(), IMAGES)
    (group,) = [group for group in coupled_channels(graph, IMAGES)[0] if group.root == "first"]
    fit = fit_layers(graph, merge_cuts(group.cuts([1, 4])), [IMAGES[:6], IMAGES[6:]], 16)["shared"]
    x = torch.relu(graph.first(IMAGES))
    read = torch.cat([each.movedim(1, -1).flatten(0, -2) for each in (x, nn.functional.avg_pool2d(x, 2))])
    given = read @ graph.shared.weight.flatten(1).T
    compensated = read[:, [0, 2, 3, 5]] @ fit.weight.flatten(1).T + fit.bias
    assert torch.allclose(compensated.mean(0), given.mean(0), atol=1e-5)
    one = torch.ones(len(read), 1)
    stays = torch.cat([read[:, [0, 2, 3, 5]], one], 1)
    least = (stays @ torch.linalg.lstsq(stays, given).solution - given).square().sum()
    assert (compensated - given).square().sum() < 1.01 * least


class SharedBias(nn.Module):
    """The sum of two convolutions, with a shared bias or with equal separate biases."""

    def __init__(self, shared):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU())
        self.first, self.second = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1)
        self.second.bias = self.first.bias if shared else nn.Parameter(self.first.bias.detach().clone())
        self.classifier = nn.Linear(32, 5)

    def forward(self, images):
        features = self.stem(images)
        return self.classifier((self.first(features) + self.second(features)).relu().mean((2, 3)))


def test_a_shared_bias_is_set_to_the_mean_of_the_fits():
    images = torch.randn(64, 3, 8, 8)
    errors = []
    for shared in (True, False):
        network = SharedBias(shared).eval()
        pruned = tersor.prune(network, [images], keep_macs=0.7)
        errors.append(((pruned(images) - network(images)).norm() / network(images).norm()).item())
    assert errors[0] < 1.5 * errors[1], "4.7 times larger if the bias takes both"
