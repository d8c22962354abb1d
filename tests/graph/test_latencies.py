"""What channels save of a latency, against a stopwatch that counts."""

import pytest
import torch
from torch import nn

from tersor.graph.branches import branches
from tersor.graph.capture import capture
from tersor.graph.latencies import saved_latency
from tersor.graph.widths import prices, removable
from tersor.measure import costs
from tersor.zoo import build

IMAGES = torch.rand(1, 3, 32, 32)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    graph = capture(build("resnet20", 10).eval())
    return graph, removable(graph, IMAGES, ("*.conv2",), "channel_pruning")[0]


class Counted:
    """A stopwatch of a machine of which each convolution takes what a function says of it."""

    def __init__(self, graph, takes):
        self.graph, self.takes, self.timed = graph, takes, 0

    def of(self, graph):
        return sum(self.takes(layer) for layer in graph.modules() if isinstance(layer, nn.Conv2d))

    def __call__(self, network):
        self.timed += 1
        return self.of(network) / self.of(self.graph)


def saved(graph, groups, watch, *, round_to=8, floor=0.0, with_branches=True):
    macs = prices("macs", graph, groups, {layer.name: layer.macs for layer in costs(graph, IMAGES).layers})
    cuts = branches(graph, groups, IMAGES) if with_branches else {}
    options = {"macs": macs, "round_to": round_to, "floor": floor, "branches": cuts}
    return saved_latency(graph, groups, IMAGES, watch, **options)


def test_what_each_group_saves_is_what_the_network_takes_less(resnet):
    graph, groups = resnet
    watch = Counted(graph, lambda layer: layer.in_channels + layer.out_channels)
    saves, before = saved(graph, groups, watch), watch.of(graph)
    numbers = {group.root: number for number, group in enumerate(groups)}
    assert saves(numbers["layer1.0.conv1"], 0) == 0
    assert saves(numbers["layer1.0.conv1"], 8) == pytest.approx(2 * 8 / before)
    assert saves(numbers["layer1.0.conv1"], 16) == pytest.approx(2 * 32 / before), "the whole branch"
    of_sixty_four = [numbers[f"layer3.{block}.conv1"] for block in range(3)]
    for gone in (8, 24, 56):
        assert sum(saves(number, gone) for number in of_sixty_four) == pytest.approx(3 * 2 * gone / before)
    assert sum(saves(number, 64) for number in of_sixty_four) == pytest.approx((5 * 128 + 32 + 64) / before)
    assert saves(of_sixty_four[0], 8) < saves(of_sixty_four[1], 8), "its first layer reads half as much"
    assert watch.timed == 2 + 4 + 8, "once for each width of layers that are alike"


def test_a_curve_is_straight_between_what_was_timed_and_never_falls(resnet):
    graph, groups = resnet
    watch = Counted(graph, lambda layer: 1000 - layer.out_channels)  # what is narrower is slower
    saves = saved(graph, groups, watch, with_branches=False)
    assert all(saves(number, gone) == 0 for number in range(len(groups)) for gone in (0, 8, 12))
    fine = Counted(graph, lambda layer: layer.out_channels)
    saves = saved(graph, groups, fine, round_to=1, with_branches=False)
    assert fine.timed == 3 * 8
    last, each = len(groups) - 1, 1 / fine.of(graph)
    assert saves(last, 24) + saves(last - 1, 24) + saves(last - 2, 24) == pytest.approx(72 * each)
    assert saves(last, 21) == pytest.approx(saves(last, 42) / 2)
