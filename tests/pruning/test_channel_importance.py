"""Importance of coupled channels, compared with slow implementations and, for equal formulas, with torch-pruning."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tersor import tasks
from tersor.core.errors import InputError
from tersor.graph.capture import capture
from tersor.pruning.channel_groups import Cut, Group, coupled_channels
from tersor.pruning.channel_importance import distances, gradients, importances

IMAGES = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(12) % 4
DATA = [(IMAGES[:8], LABELS[:8]), (IMAGES[8:], LABELS[8:])]


class Net(nn.Module):
    """Two convolutions coupled by a sum, and a linear layer over the flattened pixels."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6 * 16, 4)

    def forward(self, x):
        x = self.norm(self.first(x))
        return self.head(F.relu(x + self.second(x)).flatten(1))


@pytest.fixture
def graph():
    torch.manual_seed(0)
    net = Net().eval()
    nn.init.normal_(net.norm.weight)
    net.norm.running_mean.normal_()
    return capture(net, IMAGES)


def scores(graph, kind, **options):
    (group,), _ = coupled_channels(graph, IMAGES)
    (found,) = importances(kind, graph, [group], data=DATA, images=options.pop("images", 12), seed=0)
    return group, found


def owned_slowly(graph, of, group, channel):
    """Layer and axis -> the part of the tensors `of` that belongs to the channel, as a vector."""
    found = {}
    for cut in group.slices[channel]:
        if isinstance(graph.get_submodule(cut.layer), nn.Conv2d | nn.Linear):
            tensor = of(cut.layer)
            rows = [tensor[place] if cut.axis == "out" else tensor[:, place] for place in cut.channels]
            found[cut.layer, cut.axis] = [row.flatten() for row in rows]
    return found


@pytest.mark.parametrize("kind", ["magnitude", "magnitude_l1", "fpgm"])
def test_weight_scores_are_relative_to_the_mean_of_each_layer(graph, kind):
    group, found = scores(graph, kind)
    size = len(group.slices)
    owned = [
        owned_slowly(graph, lambda layer: graph.get_submodule(layer).weight.detach(), group, channel)
        for channel in range(size)
    ]
    expected = torch.zeros(size)
    assert len(owned[0]) == 4, "two that write, two that read"
    for part in owned[0]:
        every = [row for each in owned for row in each[part]]
        each = []
        for channel in range(size):
            rows = owned[channel][part]
            if kind == "fpgm":
                each.append(sum(float((row - other).square().sum().sqrt()) for row in rows for other in every))
            else:
                each.append(
                    sum(
                        float(value) ** 2 if kind == "magnitude" else abs(float(value)) for row in rows for value in row
                    )
                )
        expected += torch.tensor(each) / (sum(each) / size) / len(owned[0])
    assert torch.allclose(found, expected, rtol=1e-4)
    assert float(found.mean()) == pytest.approx(1, abs=1e-5)


def test_taylor_importance_sums_gradient_times_weight_over_a_channel(graph):
    group, found = scores(graph, "taylor")
    reference = copy.deepcopy(graph)
    F.cross_entropy(reference(IMAGES), LABELS).backward()
    expected = []
    for channel in range(len(group.slices)):
        owned = owned_slowly(
            reference,
            lambda layer: (lambda w: w.detach() * w.grad)(reference.get_submodule(layer).weight),
            group,
            channel,
        )
        expected.append(sum(float(row.abs().sum()) for rows in owned.values() for row in rows))
    assert torch.allclose(found, torch.tensor(expected), rtol=1e-4)


def test_taylor_importance_does_not_change_the_network(graph):
    graph.train()
    graph.get_submodule("first").weight.grad = torch.ones(6, 3, 3, 3)
    graph.get_submodule("second").requires_grad_(False)
    before = {key: value.clone() for key, value in graph.state_dict().items()}
    random = torch.get_rng_state()
    found = gradients(graph, DATA, 10)
    assert all(torch.equal(before[key], value) for key, value in graph.state_dict().items())
    assert (graph.get_submodule("first").weight.grad == 1).all()
    assert graph.get_submodule("second").weight.grad is None
    assert all(module.training for module in graph.modules())
    assert torch.equal(torch.get_rng_state(), random)
    reference = copy.deepcopy(graph).eval().requires_grad_(True)
    reference.zero_grad()
    F.cross_entropy(reference(IMAGES[:10]), LABELS[:10]).backward()
    for name, parameter in graph.named_parameters():
        assert torch.allclose(found[parameter], reference.get_parameter(name).grad, atol=1e-6)


def test_batchnorm_importance_is_the_absolute_gamma(graph):
    _, found = scores(graph, "batchnorm")
    assert torch.equal(found, graph.get_submodule("norm").weight.detach().abs())


def test_batchnorm_importance_is_none_without_batchnorm():
    graph = capture(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 4)), IMAGES
    )
    groups, _ = coupled_channels(graph, IMAGES)
    assert importances("batchnorm", graph, groups, data=DATA, images=1, seed=0) == [None] * len(groups)


def test_random_importance_depends_on_the_seed_only(graph):
    before = torch.get_rng_state()
    (group,), _ = coupled_channels(graph, IMAGES)
    first, second = importances("random", graph, [group, group], data=DATA, images=1, seed=3)
    again, _ = importances("random", graph, [group, group], data=DATA, images=1, seed=3)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


MINE = """
import torch
def last_first(group): return -torch.arange(len(group.slices))
def by_gamma(graph, group, data): return graph.get_submodule("norm").weight * len(data)
def wrong(group): return torch.ones(2)
def of_a_weight(weight, layer): return weight.abs()
def endless(group): return torch.full((len(group.slices),), torch.inf)
"""


def test_a_users_importance_function_is_used_and_checked(graph, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert scores(graph, "mine:last_first")[1].tolist() == [0, -1, -2, -3, -4, -5]
    assert torch.equal(scores(graph, "mine:by_gamma")[1], 2 * graph.get_submodule("norm").weight.detach())
    with pytest.raises(InputError, match=r"returned a tensor of shape \(2,\) for the 6 channels.*shape \(6,\)"):
        scores(graph, "mine:wrong")
    with pytest.raises(InputError, match="finite"):
        scores(graph, "mine:endless")
    arguments = r"graph is .*, group is one group .*, data are .*group\.slices, such as: (def .*)\.$"
    expected = rf"missing a required argument: 'weight'.* {arguments}"
    with pytest.raises(InputError, match=expected) as caught:
        scores(graph, "mine:of_a_weight")
    (tmp_path / "example.py").write_text(f"import torch\n{re.search(expected, str(caught.value))[1]}\n")
    assert scores(graph, "example:random")[1].shape == (6,), "the example of the message works"


def test_taylor_without_labels_raises(graph):
    (group,), _ = coupled_channels(graph, IMAGES)
    with pytest.raises(InputError, match="no labels"):
        importances("taylor", graph, [group], data=[IMAGES], images=4, seed=0)


@pytest.mark.parametrize("task", ["regression", "multilabel"])
def test_taylor_uses_the_loss_of_the_task(graph, task):
    goal, targets = tasks.build(task), (IMAGES.mean((2, 3)) @ torch.ones(3, 4) > 1.5).long()
    found = gradients(graph, [(IMAGES[:8], targets[:8]), (IMAGES[8:], targets[8:])], 10, goal)
    weight = graph.get_submodule("head").weight
    (expected,) = torch.autograd.grad(goal.loss(graph(IMAGES[:10]), targets[:10]), [weight])
    torch.testing.assert_close(found[weight], expected)


def test_gradients_of_the_cross_entropy_are_bit_identical_to_those_of_its_sum(graph):
    found = gradients(graph, [(IMAGES[:7], LABELS[:7])], 7)
    weight = graph.get_submodule("head").weight
    (expected,) = torch.autograd.grad(F.cross_entropy(graph(IMAGES[:7]), LABELS[:7], reduction="sum"), [weight])
    assert torch.equal(found[weight], expected / 7)


def test_a_loss_that_cannot_be_used_raises(graph):
    (group,), _ = coupled_channels(graph, IMAGES)
    options = {"data": DATA, "images": 4, "seed": 0}
    with pytest.raises(InputError, match=r"the task distance the loss is the distance .* Write importance: magnitude"):
        importances("taylor", graph, [group], task=tasks.build("distance"), **options)
    with pytest.raises(InputError, match=r"loss of the task detection in eval mode: .* importance: magnitude"):
        importances("taylor", graph, [group], task=tasks.build("detection"), **options)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_distances_are_summed_over_all_other_rows(rows, numbers, seed):
    given = torch.randn(rows, numbers, generator=torch.Generator().manual_seed(seed))
    expected = [sum(float((one - other).square().sum()) ** 0.5 for other in given) for one in given]
    assert torch.allclose(distances(given), torch.tensor(expected), rtol=1e-3, atol=1e-4)


def peers(net, importance):
    """The scores of torch-pruning for the channels of `net.first`, per layer if it does not reduce them."""
    group = (
        tp.DependencyGraph()
        .build_dependency(net, IMAGES[:1])
        .get_pruning_group(net[0], tp.prune_conv_out_channels, list(range(8)))
    )
    return importance(group)


@pytest.fixture
def plain():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


WEIGHTS = (nn.Conv2d, nn.Linear)


@pytest.mark.parametrize(("kind", "power"), [("magnitude", 2), ("magnitude_l1", 1)])
def test_magnitude_equals_torch_pruning(plain, kind, power):
    theirs = peers(
        plain,
        tp.importance.GroupMagnitudeImportance(p=power, group_reduction=None, normalizer=None, target_types=WEIGHTS),
    )
    expected = (theirs / theirs.mean(1, keepdim=True)).mean(0)
    assert torch.allclose(of_the_first(plain, kind), expected, rtol=1e-5)


def test_fpgm_equals_torch_pruning_if_no_weight_is_negative(plain):
    for layer in (plain[0], plain[3]):
        layer.weight.data.abs_()
    theirs = peers(plain, tp.importance.FPGMImportance(p=1, group_reduction=None, normalizer=None))
    expected = (theirs / theirs.mean(1, keepdim=True)).mean(0)
    assert torch.allclose(of_the_first(plain, "fpgm"), expected, rtol=1e-3)


def test_batchnorm_equals_torch_pruning(plain):
    nn.init.normal_(plain[1].weight)
    assert torch.allclose(
        of_the_first(plain, "batchnorm"), peers(plain, tp.importance.BNScaleImportance(normalizer=None))
    )


def test_taylor_equals_torch_pruning(plain):
    plain.eval()
    ours = of_the_first(plain, "taylor")
    F.cross_entropy(plain(IMAGES), LABELS).backward()
    theirs = peers(
        plain, tp.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None, target_types=WEIGHTS)
    )
    assert torch.allclose(ours, theirs, rtol=1e-4)


def of_the_first(net, kind):
    graph = capture(copy.deepcopy(net), IMAGES)
    groups, _ = coupled_channels(graph, IMAGES)
    group = next(group for group in groups if group.root == "0")
    return importances(kind, graph, [group], data=DATA, images=12, seed=0)[0]


def test_a_channel_can_cover_several_columns_of_a_layer():
    graph = capture(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 1)), torch.rand(1, 1, 2, 2))
    cut = [tuple(range(4)), tuple(range(4, 8))]
    group = Group("0", tuple((Cut("0", "out", (c,)), Cut("2", "in", cut[c])) for c in range(2)))
    graph.get_submodule("0").weight.data[:] = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)
    graph.get_submodule("2").weight.data[:] = torch.tensor([[1.0, 1, 1, 1, 1, 0, 0, 0]])
    (found,) = importances("magnitude_l1", graph, [group], data=[], images=1, seed=0)
    assert torch.allclose(found, torch.tensor([(0.5 + 1.6) / 2, (1.5 + 0.4) / 2]))


@pytest.mark.parametrize("kind", ["magnitude", "magnitude_l1", "fpgm", "taylor"])
def test_a_transposed_convolution_has_the_scores_of_the_equivalent_convolution(kind):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    transposed = nn.Sequential(nn.ConvTranspose2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 1), *plain[2:])
    for layer, of_plain in zip(transposed[:2], plain[:2], strict=True):
        layer.weight.data, layer.bias.data = of_plain.weight.data.transpose(0, 1).contiguous(), of_plain.bias.data
    data = [(torch.rand(6, 3, 2, 2), torch.arange(6))]
    found = []
    for network in (plain, transposed):
        graph = capture(network.eval(), data[0][0])
        groups, _ = coupled_channels(graph, data[0][0])
        found += importances(kind, graph, groups, data=data, images=6, seed=0)
    assert torch.allclose(found[0], found[1], rtol=1e-4)
    assert found[0].std() > 0.01
