"""Which networks share a record of torch.export in the tests."""

import pytest
import torch
from torch import nn
from torch.export import Dim

import recorded_once
from tersor.graph import export_program
from tersor.graph.capture import capture

IMAGES = torch.zeros(2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self, width=4, factor=2):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.factor = factor

    def forward(self, x):
        return self.factor * self.second(self.first(x))


class Negative(Net):
    def forward(self, x):
        return -super().forward(x)


def key(network, images=IMAGES):
    return recorded_once._key(network, images, Dim.DYNAMIC)


def changed(change):
    network = Net()
    change(network)
    return network


def test_networks_of_one_class_with_equal_settings_share_a_record():
    assert key(Net()) == key(Net())
    captured = [capture(Net(), IMAGES) for _ in range(2)]  # compares the outputs
    assert not torch.equal(captured[0].first.weight, captured[1].first.weight)
    first, second = (set(each.graph.nodes) for each in captured)
    assert not first & second, "a change of one graph changes no other"


@pytest.mark.parametrize(
    "other",
    [
        Net(width=5),
        Net(factor=3),
        Negative(),
        changed(lambda network: setattr(network.second, "stride", (2, 2))),
        changed(lambda network: setattr(network.second, "weight", network.second.bias)),
        changed(lambda network: setattr(network, "second", nn.Conv2d(4, 4, 3, bias=False))),
        changed(lambda network: network.double()),
    ],
)
def test_different_networks_do_not_share_a_record(other):
    assert key(other) != key(Net())


def test_shared_modules_and_other_image_sizes_are_a_difference():
    assert key(Net(), torch.zeros(2, 3, 9, 9)) != key(Net())
    layer = nn.ReLU()
    assert key(nn.Sequential(layer, layer)) != key(nn.Sequential(nn.ReLU(), nn.ReLU()))


@pytest.mark.parametrize(
    "change",
    [
        lambda network: setattr(network, "table", torch.zeros(2)),
        lambda network: setattr(network, "kept", [object()]),
        lambda network: network.first.register_forward_hook(print),
    ],
)
def test_networks_with_other_attributes_are_recorded_every_time(change):
    with pytest.raises(recorded_once._OtherError):
        key(changed(change))


def test_the_shared_record_is_active():
    assert export_program._exported is recorded_once._recorded_once
