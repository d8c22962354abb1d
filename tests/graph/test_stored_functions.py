"""Networks that store functions which use their modules: copies of such networks use the modules of the copy."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tersor
from tersor.graph.plain_network import plain_copy

IMAGES = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    def __init__(self, prepare):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.features, self.block = None, None
        prepare(self)

    def forward(self, images):
        inner = F.relu((self.block or self.conv)(F.relu(self.stem(images))))
        return self.head(inner.mean((2, 3)) if self.features is None else self.features.mean((2, 3)))


def a_lambda(network):
    network.block = lambda features: F.relu(network.conv(features))


def a_default(network):
    network.block = lambda features, *, conv=network.conv: F.relu(conv(features))


def functions_in_a_function(network):
    def twice(features, depth=1):
        features = F.relu(network.conv(features))
        return twice(features, depth - 1) if depth else features

    network.block = lambda features: twice(features)


def a_bound_method(network):
    run = network.conv.forward
    network.conv.forward = lambda features: F.relu(run(features))


def a_hook(network):
    def keep(_module, _inputs, output):
        network.features = output

    network.conv.register_forward_hook(keep)


def a_hook_with_a_list(network):
    network.collected = []

    def keep(_module, _inputs, output, collected=network.collected):
        collected[:] = [output]

    network.conv.register_forward_hook(keep)
    network.head.register_forward_pre_hook(lambda _module, _inputs: network.collected[0].mean((2, 3)))


KINDS = [a_lambda, a_default, functions_in_a_function, a_bound_method, a_hook, a_hook_with_a_list]


@pytest.fixture(params=KINDS, ids=lambda each: each.__name__)
def network(request):
    return Network(request.param).eval()


def test_a_copy_and_its_copies_use_their_own_modules(network):
    expected = network(IMAGES)
    for copied in (first := plain_copy(network), copy.deepcopy(first)):
        assert torch.equal(copied(IMAGES), expected)
        copied.conv.weight.data.zero_()
        copied.conv.bias.data.fill_(2.0)
        assert not torch.allclose(copied(IMAGES), expected)
        assert torch.equal(network(IMAGES), expected)


def test_a_copied_function_keeps_name_and_arguments():
    network = Network(a_lambda)

    def block(features, scale=2.0):
        """A block."""
        return scale * network.conv(features)

    network.block = block
    copied = plain_copy(network).block
    assert (copied.__name__, copied.__doc__) == ("block", "A block.")
    features = torch.rand(1, 8, 4, 4)
    assert torch.equal(copied(features, scale=1.0), network.conv(features))


def test_functions_that_do_not_use_the_networks_modules_are_not_copied():
    network = Network(a_lambda)
    network.activation, other = F.relu, nn.Linear(2, 2)
    network.scale = lambda features: 2 * other(features)

    def halved(features, times):
        return halved(features / 2, times - 1) if times else features

    network.halved = halved
    copied = plain_copy(network)
    assert copied.activation is F.relu
    assert copied.scale is network.scale
    assert copied.halved is halved


def test_a_network_with_stored_functions_is_computed_in_integers(network, tmp_path):
    quantized = tersor.quantize(network, IMAGES)
    assert tersor.integer_coverage(quantized, IMAGES).operators == ()
    assert tersor.export(quantized, IMAGES, tmp_path / "model.onnx").stat().st_size


def test_a_copy_of_a_network_with_stored_functions_can_be_trained(network):
    copied = plain_copy(network).train()
    copied(IMAGES).sum().backward()
    assert all(each.grad is not None for each in copied.stem.parameters())
    assert copied.conv.weight.grad is not None
    assert network.conv.weight.grad is None
