"""Captured graphs keep the gradients of checkpointed parts of a forward method."""

import pytest
import torch
from torch import nn
from torch.utils import checkpoint

import tersor
from tersor.graph.capture import capture
from tersor.graph.plain_checkpointing import without_checkpointing
from toy_networks import Swish


class Checkpointed(nn.Module):
    def __init__(self, activation, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16))
        self.classifier = nn.Linear(16, 5)
        self.activation, self.reentrant = activation, reentrant

    def part(self, images):
        return self.activation(self.layers(images))

    def forward(self, images):
        features = checkpoint.checkpoint(self.part, images, use_reentrant=self.reentrant)
        return self.classifier(features.mean((2, 3)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("activation", [torch.relu, Swish.apply], ids=["relu", "own function"])
def test_gradients_of_the_graph_equal_those_of_the_checkpointed_network(activation, reentrant):
    network, images = Checkpointed(activation, reentrant).eval(), torch.randn(4, 3, 8, 8, requires_grad=True)
    graph = capture(network, images)
    expected = torch.autograd.grad(network(images).square().sum(), [*network.parameters()], allow_unused=reentrant)
    found = torch.autograd.grad(graph(images).square().sum(), [*graph.parameters()])
    names = [name for name, _ in network.named_parameters()]
    assert [name for name, _ in graph.named_parameters()] == names
    for name, *pair in zip(names, expected, found, strict=True):
        assert pair[0] is None or torch.allclose(*pair, atol=1e-5), name


def test_a_pruned_network_can_be_trained():
    pruned = tersor.prune(Checkpointed(Swish.apply, False).eval(), [torch.randn(8, 3, 8, 8)], keep_macs=0.6)
    pruned.train()(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


def test_the_checkpointing_of_torch_is_restored():
    before = checkpoint.CheckpointFunction
    with without_checkpointing():
        assert checkpoint.CheckpointFunction is not before
    assert checkpoint.CheckpointFunction is before
