"""The order in which channels are removed, and the remaining cost, compared with the costs of the pruned network."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tersor.core.errors import InputError
from tersor.evaluation.costs import costs
from tersor.graph.capture import capture
from tersor.methods.ptq import PTQ
from tersor.models import build
from tersor.pruning.channel_groups import Cut, Group, coupled_channels, remove
from tersor.pruning.channel_selection import (
    channel_costs,
    refuse_parametrized,
    remaining_costs,
    removable_groups,
    removal_order,
)
from tersor.pruning.mask import Mask
from tersor.quantization.range_tracking import RunningLargest
from tersor.training.context import AttachContext

IMAGES = torch.rand(1, 3, 32, 32)


def group(root, size, places=1):
    return Group(root, tuple((Cut(root, "out", tuple(range(c * places, (c + 1) * places))),) for c in range(size)))


def order_of(sizes, scores, **options):
    groups = [group(f"layer{number}", size, options.pop("places", 1)) for number, size in enumerate(sizes)]
    given = {"scope": "layer", "round_to": 1, "floor": 0.0, **options}
    return removal_order(groups, [torch.tensor(each) for each in scores], **given)


def test_scope_layer_removes_from_the_layers_in_turn():
    order = order_of([2, 4], [[9.0, 8.0], [1.0, 4.0, 2.0, 3.0]])
    assert order.blocks == [(1, 1), (1, 2), (0, 1), (1, 3)]
    assert order.removed(3) == [[1], [0, 2]]
    assert order.cuts(3) == [Cut("layer0", "out", (1,)), Cut("layer1", "out", (0, 2))]


def test_scope_global_removes_the_least_important_of_all_layers_first():
    order = order_of([2, 3], [[9.0, 8.0], [1.0, 4.0, 2.0]], scope="global")
    assert order.blocks == [(1, 1), (1, 2), (0, 1)]


TRACKED = {
    "masked": (Mask, r"^0 is already masked; .* the one that masks weights, such as weight_pruning\.$"),
    "psgd": (lambda _shape: RunningLargest(), r"^0 has a running range of an earlier psgd .* before psgd\.$"),
}


@pytest.mark.parametrize("case", TRACKED)
def test_the_error_names_the_method_that_was_applied_too_early(case):
    make, message = TRACKED[case]
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    parametrize.register_parametrization(network[0], "weight", make(network[0].weight.shape))
    with pytest.raises(InputError, match=message):
        refuse_parametrized(capture(network, IMAGES), "channel_pruning")


@pytest.mark.parametrize(
    ("method", "end"),
    [
        ("channel_pruning", r"such as ptq or qat\. In Python, call tersor\.prune before tersor\.quantize\.$"),
        ("group_lasso", r"such as ptq or qat\.$"),
    ],
)
def test_only_the_error_for_channel_pruning_suggests_a_python_function(method, end):
    quantized = PTQ().attach(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), AttachContext(data=[IMAGES])).model
    with pytest.raises(InputError, match=rf"is already quantized; {method} must come before that\. .*{end}"):
        refuse_parametrized(quantized, method)


def test_importances_are_divided_by_cost():
    scores = [[3.0, 4.0, 9.0], [1.0, 2.0, 9.0]]
    order = order_of([3, 3], scores, scope="global", channel_costs=[10.0, 1.0])
    assert order.blocks == [(0, 1), (0, 2), (1, 1), (1, 2)]
    free = order_of([3, 3], scores, scope="global", channel_costs=[0.0, 1.0])
    assert free.blocks == [(1, 1), (1, 2), (0, 1), (0, 2)], "what costs nothing saves nothing"


@pytest.mark.parametrize("kind", ["macs", "parameters", "channels"])
def test_the_cost_of_a_channel_is_the_cost_saved_by_its_removal(kind):
    graph = capture(build("resnet20", 10).eval(), IMAGES)
    groups, _ = removable_groups(graph, IMAGES, (), "channel_pruning")
    found = channel_costs(kind, graph, groups, {layer.name: layer.macs for layer in costs(graph, IMAGES).layers})
    before = costs(graph, IMAGES)
    for number in range(len(groups)):
        cut = copy.deepcopy(graph)
        remove(cut, groups[number].cuts([0]))
        after = costs(cut, IMAGES)
        saved = {"macs": before.macs - after.macs, "parameters": before.parameters - after.parameters, "channels": 1}
        assert found[number] == pytest.approx(saved[kind], rel=1e-6)


@pytest.mark.parametrize(
    ("size", "round_to", "floor", "kept"),
    [(10, 4, 0.0, [8, 4]), (16, 8, 0.0, [8]), (16, 4, 0.6, [12]), (3, 8, 0.0, []), (5, 1, 0.5, [4, 3])],
)
def test_widths_are_rounded_and_respect_the_floor(size, round_to, floor, kept):
    order = order_of([size], [[*map(float, range(size))]], round_to=round_to, floor=floor)
    assert [size - end for _, end in order.blocks] == kept


def test_rounding_includes_all_positions_of_a_channel():
    assert [end for _, end in order_of([6], [[*map(float, range(6))]], places=64, round_to=8).blocks] == [1, 2, 3, 4, 5]
    assert [end for _, end in order_of([6], [[*map(float, range(6))]], places=4, round_to=8).blocks] == [2, 4]


class Mixed(nn.Module):
    """A sum that couples layers, a depthwise convolution, and a linear layer over the flattened pixels."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.second, self.each = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, groups=12)
        self.third, self.head = nn.Conv2d(12, 9, 1, bias=False), nn.Linear(9 * 36, 4)

    def forward(self, x):
        x = self.norm(self.first(x))
        return self.head(self.third(self.each(x + self.second(x)).relu()).flatten(1))


def transposed():
    return nn.Sequential(
        nn.ConvTranspose2d(3, 12, 2, 2), nn.BatchNorm2d(12), nn.ConvTranspose2d(12, 9, 1), nn.Conv2d(9, 4, 1)
    )


@pytest.mark.parametrize("kind", ["macs", "parameters"])
@pytest.mark.parametrize(("build", "blocks"), [(Mixed, 5), (transposed, 5)])
def test_predicted_remaining_costs_equal_the_costs_of_the_pruned_network(build, blocks, kind):
    torch.manual_seed(0)
    image = torch.rand(1, 3, 8, 8)
    graph = capture(build().eval(), image)
    groups, _ = coupled_channels(graph, image)
    order = removal_order(
        groups, [torch.rand(len(each.slices)) for each in groups], scope="global", round_to=3, floor=0.1
    )
    spent = costs(graph, image)
    found = remaining_costs(kind, graph, order, {layer.name: layer.macs for layer in spent.layers})
    assert len(found) == len(order.blocks) + 1 == blocks + 1
    assert found == sorted(found, reverse=True)
    for number, fraction in enumerate(found):
        network = copy.deepcopy(graph)
        remove(network, order.cuts(number))
        assert fraction == pytest.approx(getattr(costs(network, image), kind) / getattr(spent, kind), abs=1e-9)


def test_remaining_fractions_of_channels():
    order = order_of([2, 4], [[9.0, 8.0], [1.0, 4.0, 2.0, 3.0]])
    assert remaining_costs("channels", capture(nn.Sequential(), IMAGES), order, {}) == pytest.approx(
        [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6]
    )


class Sum(nn.Sequential):
    """The sum of the outputs of all layers, each computed from the pixels."""

    def forward(self, images):
        return sum(layer(images.flatten(1)) for layer in self)


def test_costs_of_thousands_of_blocks_need_one_pass_over_the_network(monkeypatch):
    """2,500 blocks of 4 channels in 6 layers: one pass over the network per block would take minutes."""
    graph = capture(Sum(*[nn.Linear(10_000, 1, bias=False) for _ in range(6)]), torch.rand(1, 1, 100, 100))
    slices = tuple(tuple(Cut(str(layer), "in", (c,)) for layer in range(6)) for c in range(10_000))
    order = removal_order([Group("0", slices)], [torch.rand(10_000)], scope="global", round_to=4, floor=0.0)
    walks = []
    named_modules = graph.named_modules
    monkeypatch.setattr(
        graph, "named_modules", lambda *given, **options: walks.append(1) or named_modules(*given, **options)
    )
    found = remaining_costs("parameters", graph, order, {})
    assert len(walks) < 10
    assert found[-1] == pytest.approx(4 / 10_000)


def test_groups_that_cannot_be_removed_are_reported():
    graph = capture(build("resnet20", 10).eval(), IMAGES)
    groups, whole = removable_groups(graph, IMAGES, ["layer1"], "channel_pruning")
    assert {group.root.split(".")[0] for group in groups} == {"layer2", "layer3"}
    assert "linear" in whole
    with pytest.raises(InputError, match="matches no layer"):
        removable_groups(graph, IMAGES, ["layr1"], "channel_pruning")
