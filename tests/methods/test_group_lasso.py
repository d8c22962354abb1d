"""The gradients added by group_lasso, compared with a slow implementation and with torch-pruning's pruner."""

import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

from tersor.core.errors import InputError
from tersor.graph.capture import capture
from tersor.methods.channel_pruning import ChannelPruning
from tersor.methods.group_lasso import GroupLasso, decay_factors
from tersor.methods.weight_pruning import WeightPruning
from tersor.pruning.channel_groups import coupled_channels
from tersor.training.context import AttachContext
from tersor.training.method import chain

IMAGES = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.third, self.head = nn.Conv2d(6, 5, 3), nn.Linear(5, 4)

    def forward(self, x):
        x = self.norm(self.first(x))
        return self.head(self.third((x + self.second(x)).relu()).relu().mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(1)
    net = Net()
    nn.init.uniform_(net.norm.weight)
    return net


def pulled(net, **options):
    """The values that a step adds to the gradients."""
    attached = GroupLasso(**options).attach(net, AttachContext(data=[IMAGES]))
    net(IMAGES).square().mean().backward()
    before = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    attached.before_step(0, torch.optim.SGD(net.parameters(), lr=0.1))
    return {name: parameter.grad - before[name] for name, parameter in net.named_parameters()}


def test_the_added_gradients_equal_the_formula(net):
    reference = copy.deepcopy(net)
    groups, _ = coupled_channels(capture(copy.deepcopy(net), IMAGES), IMAGES)
    expected = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
    for group in groups:
        energies = []
        for cuts in group.slices:
            energy = 0.0
            for cut in cuts:
                weight = reference.get_submodule(cut.layer).weight.detach()
                for place in cut.channels:
                    energy += float((weight[place] if cut.axis == "out" else weight[:, place]).square().sum())
            energies.append((energy / len(group.slices[0])) ** 0.5)
        low, high = min(energies), max(energies)
        for energy, cuts in zip(energies, group.slices, strict=True):
            gamma = 8.0 ** ((high - energy) / (high - low))
            for cut in cuts:
                weight = reference.get_submodule(cut.layer).weight.detach()
                for place in cut.channels:
                    where = (place,) if cut.axis == "out" else (slice(None), place)
                    expected[f"{cut.layer}.weight"][where] += 0.1 * gamma * weight[where]
    found = pulled(net, strength=0.1, alpha=3)
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in found)
    assert found["norm.weight"].all()
    assert not found["first.bias"].any(), "biases are left alone"


def test_the_added_gradients_equal_those_of_torch_pruning(net):
    reference = copy.deepcopy(net)
    pruner = tp.pruner.GroupNormPruner(
        reference, IMAGES[:1], tp.importance.GroupMagnitudeImportance(p=2), reg=0.1, ignored_layers=[reference.head]
    )
    reference(IMAGES).square().mean().backward()
    before = {name: parameter.grad.clone() for name, parameter in reference.named_parameters()}
    pruner.regularize(reference)
    found = pulled(net, strength=0.1)
    for name, parameter in reference.named_parameters():
        assert torch.allclose(found[name], parameter.grad - before[name], atol=1e-5), name


def test_the_least_important_channels_get_the_strongest_decay():
    assert torch.allclose(decay_factors(torch.tensor([1.0, 2.0, 3.0]), 4), torch.tensor([16.0, 4.0, 1.0]))
    assert torch.equal(decay_factors(torch.ones(3), 4), torch.ones(3))


def test_weak_channels_shrink_much_more_than_the_others(net):
    """Only the added gradients move the weights."""
    first = net.first.weight.detach().flatten(1).norm(dim=1)
    attached = GroupLasso(strength=0.1).attach(net, AttachContext(data=[IMAGES]))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    handle = attached.bind(optimizer)
    for _ in range(30):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    handle.remove()
    last = net.first.weight.detach().flatten(1).norm(dim=1) / first
    assert last.min() < 0.2 * last.max()


def test_group_lasso_before_a_method_that_changes_shapes_raises(net):
    with pytest.raises(InputError, match=r"ChannelPruning changes shapes.*separate, later stage"):
        chain(
            [GroupLasso(), ChannelPruning(keep_macs=0.6, round_to=1)],
            copy.deepcopy(net),
            AttachContext(data=[IMAGES], steps=2),
        )
    both = chain([GroupLasso(), WeightPruning(sparsity=0.5)], net, AttachContext(data=[IMAGES], steps=2))
    both.begin()
    optimizer = torch.optim.SGD(both.model.parameters(), lr=0.1)
    both.model(IMAGES).square().mean().backward()
    original = both.model.first.parametrizations.weight.original
    before = original.grad.clone()
    both.before_step(0, optimizer)
    assert not torch.equal(original.grad, before)


def test_missing_images_and_masked_networks_raise(net):
    with pytest.raises(InputError, match="needs images"):
        GroupLasso().attach(net, AttachContext())
    with pytest.raises(InputError, match="group_lasso in a stage before"):
        GroupLasso().attach(WeightPruning().attach(net, AttachContext()).model, AttachContext(data=[IMAGES]))
