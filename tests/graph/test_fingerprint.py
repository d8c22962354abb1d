"""The fingerprint of a captured network changes with its wiring, its settings and the scalars of `forward`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tersor.graph.capture import capture
from tersor.graph.fingerprint import FINGERPRINT

IMAGES = torch.rand(2, 3, 8, 8)
WIRED = {
    "a - b": lambda net, x: net.a(x) - net.b(x),
    "b - a": lambda net, x: (lambda first, second: second - first)(net.a(x), net.b(x)),
    "b(a)": lambda net, x: net.b(net.a(x)),
    "a(b)": lambda net, x: net.a(net.b(x)),
    "skip": lambda net, x: net.b(net.a(x)) + x,
    "skip of a": lambda net, x: (lambda first: net.b(first) + first)(net.a(x)),
    "times 2": lambda net, x: net.a(x) * torch.tensor(2.0),
    "times 3": lambda net, x: net.a(x) * torch.tensor(3.0),
}
SET = [
    nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
    nn.AvgPool2d(3, 2, 1),
    nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    nn.AvgPool2d(3, 2, 1, divisor_override=1),
]


class Wired(nn.Module):
    def __init__(self, function, layer=None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.layer, self.function = layer or nn.Identity(), function

    def forward(self, x):
        return self.layer(self.function(self, x)).mean((2, 3))


def fingerprint(network):
    return capture(network.eval(), IMAGES).meta[FINGERPRINT]


@pytest.mark.parametrize(
    "networks",
    [[Wired(each) for each in WIRED.values()], [Wired(WIRED["b(a)"], each) for each in SET]],
    ids=["wiring", "settings"],
)
def test_networks_with_different_code_have_different_fingerprints(networks):
    found = [fingerprint(each) for each in networks]
    assert len(set(found)) == len(networks)
    assert [fingerprint(copy.deepcopy(each).train()) for each in networks] == found
