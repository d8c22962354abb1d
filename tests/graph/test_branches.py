"""Residual branches that go whole: what is left computes what the network computes with them silent."""

import pytest
import torch
from torch import fx, nn

from tersor.graph.branches import branches
from tersor.graph.capture import capture
from tersor.graph.channels import Cut, copied, coupled_channels, remove
from tersor.graph.structure import rebuild, structure
from tersor.zoo import build

IMAGES = torch.rand(2, 3, 32, 32)


class Silent(fx.Interpreter):
    """Runs a network; of some sums one side alone."""

    def __init__(self, graph, cuts):
        super().__init__(graph)
        self.gives = {cut.layer: int(cut.axis.removeprefix("gives=")) for cut in cuts}

    def run_node(self, n):
        return self.env[n.args[self.gives[n.name]]] if n.name in self.gives else super().run_node(n)


def found(model, images=IMAGES):
    torch.manual_seed(0)
    graph = capture(model.eval())
    groups, _ = coupled_channels(graph, images[:1])
    return graph, groups, branches(graph, groups, images[:1])


def timm(name, **options):
    return pytest.importorskip("timm").create_model(name, num_classes=10, **options)


def torchvision(name):
    return getattr(pytest.importorskip("torchvision").models, name)(num_classes=10)


NETWORKS = {
    "basic": (lambda: build("resnet20", 10), 9),
    "bottleneck": (lambda: torchvision("resnet50"), 16),
    "inverted, with squeeze and excitation": (lambda: torchvision("efficientnet_b0"), 9),
    "inverted, depthwise": (lambda: torchvision("mobilenet_v2"), 10),
    "attention": (lambda: timm("vit_tiny_patch16_224", img_size=32, depth=2), 4),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_without_a_branch_a_network_gives_what_it_gave_without_adding_it(name):
    make, count = NETWORKS[name]
    graph, groups, cuts = found(make())
    assert len(cuts) == count
    some = [cuts[number] for number in list(cuts)[::2]]
    with torch.no_grad():
        expected = Silent(graph, some).run(IMAGES)
        assert not torch.equal(expected, graph(IMAGES))
        cut = copied(graph)
        remove(cut, some)
        assert torch.equal(cut(IMAGES), expected)
        gone = {groups[number].root for number in list(cuts)[::2]}
        assert not gone & {name for name, _ in cut.named_modules()}
        again = rebuild(make(), structure(cut)).eval()
        again.load_state_dict(cut.state_dict())
        assert torch.equal(again(IMAGES), expected)
    assert sum(each.numel() for each in cut.parameters()) < 0.9 * sum(each.numel() for each in graph.parameters())


def test_channels_go_with_branches_at_once():
    graph, groups, cuts = found(build("resnet20", 10))
    stream = next(group for group in groups if group.root == "conv1")
    some = [*stream.cuts([0, 5]), *cuts.values()]
    remove(graph, some)
    assert [name for name, layer in graph.named_modules() if isinstance(layer, nn.Conv2d)] == ["conv1"]
    assert graph(IMAGES).shape == (2, 10)


class Shared(nn.Module):
    """Sums whose sides are read elsewhere, or are of another size."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.twice = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.pooled, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        inner = self.second(self.first(x))
        x = x + inner
        x = x.mean((2, 3), keepdim=True) + self.last(self.pooled(x))
        x = x + self.last(self.twice(x).relu())
        return self.head((x * inner).mean((2, 3)))


def test_what_others_read_or_is_larger_than_what_stays_does_not_go():
    assert found(Shared())[2] == {}


def test_what_is_added_to_itself_has_no_branch():
    class Doubled(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + super().forward(x)

    assert found(Doubled(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3)))[2] == {}


def test_the_smaller_of_two_branches_goes_with_a_group():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.back = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            flat = x.relu()
            return self.head((x + (flat + self.back(self.inner(flat)))).mean((2, 3)))

    graph, _, cuts = found(Nested())
    assert list(cuts.values()) == [Cut("add", "gives=0", ())]
    remove(graph, list(cuts.values()))
    torch.testing.assert_close(graph(IMAGES), graph.get_submodule("head")((IMAGES + IMAGES.relu()).mean((2, 3))))
