"""Removal of whole residual branches: the pruned network computes the same as the network without these additions."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from tersor import tasks
from tersor.checkpoint.structure import rebuild, structure
from tersor.core.errors import InputError
from tersor.evaluation.costs import costs
from tersor.graph.capture import capture
from tersor.pruning import residual_branches
from tersor.pruning.channel_groups import copy_graph, coupled_channels, merge_cuts, remove
from tersor.pruning.residual_branches import cost_shares, find_branches, removal_cost
from toy_networks import short

IMAGES = torch.rand(4, 3, 32, 32)


class ReplacedSums(fx.Interpreter):
    """Runs a network in which some additions are replaced."""

    def __init__(self, graph, gives):
        super().__init__(graph)
        self.gives = gives

    def run_node(self, n):
        return self.gives[n](*[self.env[each] for each in n.args]) if n in self.gives else super().run_node(n)


def captured(model):
    return capture(model.eval(), IMAGES)


def timm(name, **options):
    return pytest.importorskip("timm").create_model(name, num_classes=10, **options)


def torchvision(name):
    return getattr(pytest.importorskip("torchvision").models, name)(num_classes=10)


NETWORKS = {
    "basic": (lambda: short("resnet8"), 3),
    "bottleneck, changed in place": (lambda: torchvision("resnet50"), 12),
    "inverted, with squeeze and excitation": (lambda: torchvision("efficientnet_b0"), 9),
    "inverted, depthwise": (lambda: short("mobilenet2"), 2),
    "attention": (lambda: timm("vit_tiny_patch16_224", img_size=32, depth=2), 4),
}


LARGE = ("bottleneck, changed in place", "inverted, with squeeze and excitation")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in NETWORKS]
)
def test_removing_a_branch_equals_skipping_its_addition(name):
    make, count = NETWORKS[name]
    torch.manual_seed(0)
    graph = captured(make())
    found = find_branches(graph, IMAGES[:1])
    assert len(found) == count
    some = found[::2]
    with torch.no_grad():
        expected = ReplacedSums(graph, {each.total: lambda *sides, each=each: sides[each.keep] for each in some}).run(
            IMAGES
        )
        assert not torch.equal(expected, graph(IMAGES))
        cut = copy_graph(graph)
        remove(cut, [each.cut for each in some])
        assert torch.equal(cut(IMAGES), expected)
        there = {name for name, _ in cut.named_modules()}
        assert there.isdisjoint(name for each in some for name in each.layers)
        assert there.issuperset(name for each in found[1::2] for name in each.layers)
        again = rebuild(make(), structure(cut)).eval()
        again.load_state_dict(cut.state_dict())
        assert torch.equal(again(IMAGES), expected)
    groups, _ = coupled_channels(cut, IMAGES[:1])
    remove(cut, merge_cuts(each for group in groups for each in group.cuts([0])))
    assert cut(IMAGES).shape == (4, 10), "channels go from what is left"


class Shared(nn.Module):
    """Sums whose sides are read elsewhere, are larger than what stays, learn nothing, share their layers, or of which
    one does not come from the other.
    """

    def __init__(self):
        super().__init__()
        self.first, self.second, self.twice = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.pooled, self.aside = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(3, 4)

    def forward(self, images):
        x = images.relu()
        inner = self.second(self.first(x))
        x = x + inner
        x = x * (x + self.aside(images.flip(3)))
        x = x.mean((2, 3), keepdim=True) + self.pooled(x)
        x = x + self.twice(x).relu()
        x = x + self.twice(x).relu()
        x = x + x.relu()
        return self.head((x * inner).mean((2, 3)))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in NETWORKS]
)
def test_the_share_of_a_branch_is_what_its_removal_saves(name):
    graph = captured(NETWORKS[name][0]())
    branches, before = find_branches(graph, IMAGES), costs(graph, IMAGES)
    shares = [cost_shares(graph, branches, IMAGES, parameters=kind) for kind in (False, True)]
    for branch, macs, parameters in zip(branches, *shares, strict=True):
        pruned = copy_graph(graph)
        remove(pruned, [branch.cut])
        after = costs(pruned, IMAGES)
        assert macs == pytest.approx(1 - after.macs / before.macs)
        assert parameters == pytest.approx(1 - after.parameters / before.parameters)


def test_branches_that_are_used_elsewhere_or_broadcast_cannot_be_removed():
    assert find_branches(captured(Shared()), IMAGES[:1]) == []


class Nested(nn.Module):
    """An addition inside a branch of another addition; both work in place."""

    def __init__(self):
        super().__init__()
        self.outer, self.inner, self.back = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(3, 5)

    def forward(self, x):
        y = self.relu(self.outer(x))
        y += self.back(self.relu(self.inner(y)))
        x = x + y
        return self.head(self.relu(x).mean((2, 3)))


def test_of_two_nested_branches_the_inner_one_is_found():
    graph = captured(Nested())
    (branch,) = find_branches(graph, IMAGES[:1])
    assert branch.layers == ("inner", "back")
    remove(graph, [branch.cut])
    layers = dict(graph.named_modules())
    expected = layers["head"]((IMAGES + layers["outer"](IMAGES).relu()).relu().mean((2, 3)))
    torch.testing.assert_close(graph(IMAGES), expected)


class Later(nn.Module):
    """The kept side is changed in place after the additions."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = x * 2 - 1
        y = self.second(x + self.first(x))
        y = y + self.third(y)
        return (self.relu(x) * y).mean((2, 3))


@pytest.mark.parametrize(("make", "with_mean"), [(lambda: short("resnet8"), True), (Nested, False), (Later, False)])
def test_the_cost_is_half_the_squared_change_of_the_centered_logits(make, with_mean):
    torch.manual_seed(0)
    graph = captured(make())
    found = find_branches(graph, IMAGES[:1])
    before = {key: value.clone() for key, value in graph.state_dict().items()}
    measured_costs = removal_cost(graph, found, [IMAGES[:3], IMAGES[3:]], 4)
    assert all(torch.equal(before[key], value) for key, value in graph.state_dict().items())
    with torch.no_grad():
        for branch, change in zip(found, measured_costs, strict=True):
            sides = {
                branch.total: lambda *sides, each=branch: sides[each.keep] + with_mean * sides[1 - each.keep].mean(0)
            }
            other = ReplacedSums(graph, sides).run(IMAGES.clone()) - graph(IMAGES.clone())
            expected = (other - other.mean(1, keepdim=True)).square().sum(1).mean() / 2
            assert change == pytest.approx(float(expected), rel=1e-3)


class Several(nn.Module):
    """A residual branch without BatchNorm, and two outputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.inner(x).relu()
        return {"maps": x * 100, "others": (x.mean((2, 3)), x.argmax(1))}


def test_the_cost_for_several_outputs_is_half_their_relative_squared_error():
    torch.manual_seed(0)
    graph = captured(Several())
    (branch,) = find_branches(graph, IMAGES[:1])
    (measured_costs,) = removal_cost(graph, [branch], [IMAGES], 4, task=tasks.build("distance"))
    with torch.no_grad():
        stem = graph.get_submodule("stem")(IMAGES)
        whole = stem + graph.get_submodule("inner")(stem).relu()
    errors = [
        float((without - with_it).square().sum() / with_it.square().sum())
        for without, with_it in ((stem, whole), (stem.mean((2, 3)), whole.mean((2, 3))))
    ]
    assert measured_costs == pytest.approx(sum(errors) / 2 / 2, rel=1e-4)


def test_too_few_images_and_nonfinite_costs_raise():
    graph = captured(short("resnet8"))
    found = find_branches(graph, IMAGES[:1])
    with pytest.raises(InputError, match="measures how the outputs change on at least 2 images; given: 0"):
        removal_cost(graph, found, [], 4)
    with pytest.raises(InputError, match=r"infinite or NaN.* branches: 0"):
        removal_cost(graph, found, [IMAGES / 0], 4)


@pytest.mark.parametrize(
    "make", [lambda: torchvision("resnet18"), lambda: short("regnet_y"), lambda: short("mobilenet2")]
)
def test_networks_with_in_place_layers_can_be_trained_after_removal(make):
    graph = captured(make())
    remove(graph, [each.cut for each in find_branches(graph, IMAGES[:1])])
    graph.train()(IMAGES).square().mean().backward()
    assert all(each.grad is not None for each in graph.parameters())


class InPlace(nn.Module):
    """An activation that changes both sides of the next addition, and an addition that is used and then changed."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.first(x)
        x = x + self.second(F.relu(x, inplace=True))
        total = x + self.third(x)
        twice, y = 2 * total, self.relu(total)
        return torch.cat([x, y, twice], 1).mean((2, 3))


@pytest.mark.parametrize("layers", [["second"], ["third"], ["second", "third"]])
def test_in_place_layers_after_a_removed_addition_do_not_change_other_values(layers):
    model = InPlace()
    graph = captured(model)
    branches = {branch.layers: branch for branch in find_branches(graph, IMAGES[:1])}
    assert list(branches) == [("second",), ("third",)]
    remove(graph, [branches[layer,].cut for layer in layers])
    for layer in layers:
        nn.init.zeros_(model.get_submodule(layer).weight)
        nn.init.zeros_(model.get_submodule(layer).bias)
    assert torch.equal(graph(IMAGES), model(IMAGES))


class Tied(nn.Module):
    """Weights that are also used elsewhere."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        x = x + self.first(x)
        x = x + F.conv2d(self.second(x).relu(), self.first.weight, padding=1)
        return F.conv2d(x, self.first.weight, padding=1).mean((2, 3))


def test_weights_shared_with_a_removed_branch_are_kept():
    graph = captured(Tied())
    found = find_branches(graph, IMAGES[:1])
    assert len(found) == 2
    expected = ReplacedSums(graph, {each.total: lambda *sides, each=each: sides[each.keep] for each in found}).run(
        IMAGES
    )
    remove(graph, [each.cut for each in found])
    assert torch.equal(graph(IMAGES), expected)
    assert set(graph.state_dict()) == {"first.weight", "first.bias"}


@pytest.mark.parametrize(
    ("make", "of"), [(lambda: short("resnet8"), "layer"), (NETWORKS["inverted, depthwise"][0], "features")]
)
def test_module_outputs_refer_to_remaining_nodes_after_removal(make, of):
    graph = captured(make())
    found = find_branches(graph, IMAGES[:1])
    blocks = {path for path in graph.meta["layers"] if path.count(".") == 1 and path.startswith(of)}
    assert blocks
    remove(graph, [each.cut for each in found])
    nodes = {node.name for node in graph.graph.nodes}
    assert blocks <= graph.meta["layers"].keys()
    assert set(graph.meta["layers"].values()) <= nodes


@pytest.mark.parametrize("images", [1, 2])
def test_the_mean_of_a_branch_is_not_kept_if_the_batch_is_the_second_dimension(images):
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner, self.head = nn.BatchNorm2d(3), nn.Linear(3, 3), nn.Linear(3, 5)

        def forward(self, x):
            x = F.adaptive_avg_pool2d(self.norm(x), (1, 3)).flatten(2).permute(2, 0, 1)  # as many pixels as images
            x = x + self.inner(x)
            return self.head(x.mean(0))

    graph = captured(SequenceFirst())
    (branch,) = find_branches(graph, IMAGES[:1])
    (measured_costs,) = removal_cost(graph, [branch], [IMAGES[:images], IMAGES[images:]], 4)
    with torch.no_grad():
        change = ReplacedSums(graph, {branch.total: lambda *sides: sides[branch.keep]}).run(IMAGES) - graph(IMAGES)
    assert measured_costs == pytest.approx(
        float((change - change.mean(1, keepdim=True)).square().sum(1).mean() / 2), rel=1e-4
    )


def test_branches_that_cannot_be_removed_together_are_tried_one_by_one(monkeypatch):
    graph = captured(short("resnet8"))
    first, second, third = find_branches(graph, IMAGES[:1])

    def removed(network, cuts):
        if cuts[-2:] == [first.cut, second.cut]:
            raise RuntimeError("shapes differ")
        remove(network, cuts)
        if second.cut in cuts:
            torch.nn.init.ones_(network.get_parameter("linear.bias"))

    monkeypatch.setattr(residual_branches, "remove", removed)
    assert find_branches(graph, IMAGES[:1]) == [first, third]
