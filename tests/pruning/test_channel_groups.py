"""Removal equals masking: the pruned network has the outputs of the network with these channels set to zero."""

import copy
import json
import random

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import tersor
from tersor.core.errors import InputError
from tersor.evaluation.costs import costs
from tersor.graph.aten import arguments
from tersor.graph.capture import capture
from tersor.pruning import channel_groups
from tersor.pruning.channel_groups import (
    Cut,
    _existing_objects_not_collected,
    coupled_channels,
    merge_cuts,
    removal_difference,
    remove,
)
from toy_networks import short


class OverSome(nn.Module):
    """A slow layer norm over some of its channels only; the others are zero."""

    def __init__(self, norm, removed):
        super().__init__()
        self.norm = norm
        self.kept = [place for place in range(len(norm.weight)) if place not in removed]

    def forward(self, x):
        some = x[..., self.kept]
        mean = some.mean(-1, keepdim=True)
        variance = (some - mean).square().mean(-1, keepdim=True)
        found = torch.zeros_like(x)
        found[..., self.kept] = (some - mean) / (variance + self.norm.eps).sqrt() * self.norm.weight[self.kept]
        found[..., self.kept] += self.norm.bias[self.kept]
        return found


def masked(graph, cuts):
    """The same network with channels set to zero: filters, biases and norms are 0, shapes are unchanged."""
    network = copy.deepcopy(graph)
    tensors = dict(network.named_parameters())
    for cut in cuts:
        places = list(cut.channels)
        if cut.axis.isdecimal():
            tensors[cut.layer].data.index_fill_(int(cut.axis), torch.tensor(places), 0)
        if cut.axis not in {"out", "in"}:
            continue
        module = network.get_submodule(cut.layer)
        for key, tensor in module.named_parameters():
            if cut.axis == "out":
                tensor.data[places] = 0
            elif key == "weight" and getattr(module, "groups", 1) == 1:
                tensor.data[:, places] = 0
        if isinstance(module, nn.LayerNorm):
            network.set_submodule(cut.layer, OverSome(module, set(places)))
    for node in network.graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default):
        given = arguments(node)
        removed = {place for cut in cuts if cut.layer == given["weight"].target for place in cut.channels}
        norm = nn.LayerNorm(given["normalized_shape"], given["eps"])
        norm.weight, norm.bias = (tensors[given[name].target] for name in ("weight", "bias"))
        network.add_module(f"some_of_{node.name}", OverSome(norm, removed))
        with network.graph.inserting_before(node):
            node.replace_all_uses_with(network.graph.call_module(f"some_of_{node.name}", (given["input"],)))
    network.recompile()
    return network


def drawn(model):
    """Draw random weights and statistics, as if the network were trained: no value is zero or one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for parameter in model.parameters():
        if parameter.ndim < 2 or parameter.std() < 1e-3:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def check(model, images):
    """Remove a random half of every group; return the graph and the layers that cannot be pruned."""
    graph = capture(drawn(model).eval(), images)
    with torch.no_grad():
        before = graph(images)
        groups, whole = coupled_channels(graph, images)
        assert torch.equal(graph(images), before), "trying leaves no trace"
    parameters = {key: id(parameter) for key, parameter in graph.named_parameters()}
    draw = random.Random(1)
    halves = [draw.sample(range(len(group.slices)), len(group.slices) // 2) for group in groups]
    cuts = merge_cuts(cut for group, half in zip(groups, halves, strict=True) for cut in group.cuts(half))
    fresh, spent = copy.deepcopy(graph), costs(graph, images).macs
    expected = masked(graph, cuts)(images).detach()
    remove(graph, cuts)
    assert costs(graph, images).macs < spent / 1.9
    assert {key: id(parameter) for key, parameter in graph.named_parameters()} == parameters
    with torch.no_grad():
        found = graph(images)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    [cuts_saved] = json.loads(json.dumps(graph.meta["cuts"]))
    remove(fresh, [Cut(layer, axis, tuple(at)) for layer, axis, at in cuts_saved])
    fresh.load_state_dict(graph.state_dict())
    assert torch.equal(fresh(images), found)
    graph.train()(images).square().mean().backward()
    assert all(parameter.grad is not None for parameter in graph.parameters())
    return graph, whole


def test_removal_difference_compares_the_pruned_with_the_masked_network(monkeypatch):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    graph = capture(drawn(short("resnet8")).eval(), images)
    group = coupled_channels(graph, images)[0][0]
    assert removal_difference(graph, list(group.cuts([0, 1])), images) == ""
    monkeypatch.setattr(channel_groups, "remove", lambda pruned, _: remove(pruned, list(group.cuts([2, 3]))))
    assert removal_difference(graph, list(group.cuts([0, 1])), images) != "", "others are gone"


class Dense(nn.Module):
    """Concatenations, followed by a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(16 + 8 * place) for place in range(3)])
        self.layers = nn.ModuleList([nn.Conv2d(16 + 8 * place, 8, 3, padding=1) for place in range(3)])
        self.wide = nn.Conv2d(40, 64, 1)
        self.grouped = nn.Conv2d(64, 64, 3, padding=1, groups=16)
        self.few = nn.Conv2d(64, 32, 3, padding=1, groups=2)
        self.norm = nn.GroupNorm(16, 32)
        self.squeeze = nn.Linear(32, 8)
        self.excite = nn.Linear(8, 32)
        self.head = nn.Linear(32 * 16, 10)

    def forward(self, x):
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.cat([x, layer(F.relu(norm(x)))], dim=1)
        x = self.norm(self.few(F.relu(self.grouped(F.relu(self.wide(x))))))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))[:, :, None, None]
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 4), 1))


class Block(nn.Module):
    """Attention as in timm: one layer for query, key and value, and heads by reshape."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x):
        n, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        given = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.gamma * self.proj(given)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.places = nn.Parameter(torch.randn(1, 17, 32))
        self.blocks = nn.Sequential(Block(32, 4), Block(32, 4))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit():
    return torchvision.models.VisionTransformer(16, 4, 2, 4, 32, 64, num_classes=10)


def swin(block=None, merging=None):
    options = {"block": block, "downsample_layer": merging} if block else {}
    return torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [4, 4], [4, 4], num_classes=10, **options)


def swin_v2():
    return swin(
        torchvision.models.swin_transformer.SwinTransformerBlockV2, torchvision.models.swin_transformer.PatchMergingV2
    )


TINY = {
    "option A": (lambda: short("resnet8"), 16),
    "shuffled": (lambda: short("shufflenet"), 64),
    "depthwise": (lambda: short("mobilenet3"), 64),
    "dense and grouped": (Dense, 16),
    "fire": (lambda: torchvision.models.squeezenet1_1(num_classes=10), 64),
    "torchvision's ViT": (vit, 16),
    "timm's ViT": (PlainViT, 16),
    "Swin": (swin, 32),
    "Swin V2": (swin_v2, 32),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "Swin V2" else name for name in TINY]
)
def test_removed_channels_equal_masked_channels(name):
    torch.manual_seed(0)
    make, size = TINY[name]
    check(make(), torch.randn(2, 3, size, size))


@pytest.mark.parametrize(
    "name",
    [
        *("option A", "torchvision's ViT", "timm's ViT"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("Swin", "Swin V2")),
    ],
)
def test_every_group_can_be_removed_separately(name):
    torch.manual_seed(0)
    make, size = TINY[name]
    images = torch.randn(2, 3, size, size)
    graph = capture(drawn(make()).eval(), images)
    groups, _ = coupled_channels(graph, images)
    for group in groups:
        cuts = group.cuts(range(1, len(group.slices), 2))
        cut = copy.deepcopy(graph)
        remove(cut, cuts)
        expected = masked(graph, cuts)(images)
        assert (cut(images) - expected).abs().max() <= 1e-4 * expected.abs().max(), group.root


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "maxvit_t", "mnasnet0_5"),
        *("mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnext50_32x4d"),
        *("shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32", "wide_resnet50_2"),
        *("googlenet", "inception_v3"),
    ],
)
def test_the_smallest_network_of_every_torchvision_family_is_pruned(name):
    torch.manual_seed(0)
    options = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
    check(torchvision.models.get_model(name, num_classes=10, **options), torch.randn(2, 3, 224, 224))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *(
            "vit_tiny_patch16_224",
            "deit_tiny_patch16_224",
            "swin_tiny_patch4_window7_224",
            "convnext_atto",
            "pit_ti_224",
        ),
        *("coat_lite_tiny", "pvt_v2_b0", "xcit_nano_12_p16_224", "mixer_s32_224", "poolformer_s12", "hrnet_w18_small"),
    ],
)
def test_networks_of_timm_families_are_pruned_and_trained(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    images = torch.randn(2, 3, 224, 224)
    graph = capture(drawn(timm.create_model(name, num_classes=10)).eval(), images)
    groups, _ = coupled_channels(graph, images)
    spent = costs(graph, images).macs
    remove(graph, merge_cuts(cut for group in groups for cut in group.cuts(range(len(group.slices) // 2))))
    assert costs(graph, images).macs < spent / 1.9
    graph.train()(images).square().mean().backward()


def test_zero_padded_channels_are_removed_with_their_group():
    torch.manual_seed(0)
    graph, whole = check(short("resnet8"), torch.randn(2, 3, 16, 16))
    assert whole == {"linear": "they are outputs of the network"}
    widths = [graph.get_submodule(name).out_channels for name in ("conv1", "layer2.0.conv2", "layer3.0.conv2")]
    assert widths == [8, 16, 32]
    amounts = [node.args[1][4:] for node in graph.graph.nodes if node.name.startswith("pad")]
    assert [sum(amount) for amount in amounts] == [8, 16]


class Recurrent(nn.Module):
    """A convolution, followed by a recurrent layer over the columns."""

    def __init__(self, layer):
        super().__init__()
        self.conv, self.layer, self.head = nn.Conv2d(3, 8, 3), layer, nn.LazyLinear(5)

    def forward(self, x):
        x = self.conv(x).relu().permute(0, 3, 1, 2).flatten(2)
        return self.head(self.layer(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2, "bias": False}], ids=str)
def test_input_features_of_a_recurrent_layer_can_be_removed(kind, options):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 6, 6)
    model = Recurrent(kind(32, 7, batch_first=True, **options))
    model(images)
    graph = capture(model.eval(), images)
    groups, unprunable = coupled_channels(graph, images)
    assert [(group.root, len(group.slices)) for group in groups] == [("conv", 8)]
    assert set(unprunable) == {"head"}
    cuts = groups[0].cuts([1, 4, 6])
    expected = masked(graph, cuts)(images)
    remove(graph, cuts)
    assert graph.get_submodule("layer").weight_ih_l0.shape[1] == 4 * 5
    assert torch.allclose(graph(images), expected, atol=1e-6)


def test_attention_heads_and_channels_within_heads_are_groups():
    torch.manual_seed(0)
    images = torch.randn(1, 3, 16, 16)
    groups, whole = coupled_channels(capture(PlainViT().eval(), images), images)
    found = sorted((group.root, len(group.slices), group.width, group.within_heads) for group in groups)
    blocks = [(f"blocks.{place}.{name}", *rest) for place in (0, 1) for name, *rest in (
        ("qkv", 4, 24, False), ("qkv", 8, 1, True), ("up", 128, 1, False)
    )]  # fmt: skip
    assert found == sorted([("patches", 32, 1, False), *blocks])
    assert set(whole) == {"head"}


class Odd(nn.Module):
    """Selects one channel by its index, and reduces other channels by a maximum or sorts them."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 8, 3) for _ in range(3))
        self.free = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        one = self.first(x)[:, 2].mean((1, 2))
        most = self.second(x).amax(1).mean((1, 2))
        sorted_ = torch.sort(self.third(x), dim=1).values.mean((1, 2, 3))
        return self.head(self.free(x).mean((2, 3))) + (one + most + sorted_)[:, None]


def test_unprunable_channels_are_reported_with_a_reason():
    images = torch.randn(1, 3, 8, 8)
    groups, whole = coupled_channels(capture(Odd().eval(), images), images)
    assert [group.root for group in groups] == ["free"]
    assert {name: why for name, why in whole.items() if name != "head"} == {
        "first": "select selects one of them by its index",
        "second": "amax (amax) reduces over them",
        "third": "they go into sort (sort), an operator that channel removal does not support",
    }


def test_channels_that_no_rule_covers_are_excluded_by_the_trial_removal():
    class Smallest(nn.Module):
        """The smallest absolute value of all channels, which is written as a norm: only some norms are sums."""

        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(36, 10)

        def forward(self, x):
            return self.head(torch.linalg.vector_norm(self.conv(x), -torch.inf, dim=1).flatten(1))

    images = torch.randn(1, 3, 8, 8)
    groups, whole = coupled_channels(capture(Smallest().eval(), images), images)
    assert groups == []
    assert "the same effect on the output of linalg_vector_norm as setting them to zero" in whole["conv"]


def test_values_scaled_by_the_number_of_channels_are_not_changed_by_removal():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

        def forward(self, x):
            x = self.conv(x)
            return self.head((x / x.shape[1]).mean((2, 3)))

    check(Scaled(), torch.randn(2, 3, 8, 8))


def test_images_of_a_wrong_shape_raise():
    graph = capture(vit().eval(), torch.randn(1, 3, 16, 16))
    with pytest.raises(InputError, match=r"does not run on images \(3, 20, 20\)"):
        coupled_channels(graph, torch.randn(1, 3, 20, 20))


class Bare(nn.Module):
    """Has no submodules, and reads its number of channels."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        return F.linear(F.relu(F.linear(x.flatten(1), self.first).reshape(-1, 8)), self.second)


def test_the_trial_removal_does_not_change_a_network_without_modules():
    images = torch.randn(2, 3, 2, 2)
    graph = capture(Bare().eval(), images)
    code = graph.code
    groups, _ = coupled_channels(graph, images)
    assert [len(group.slices) for group in groups] == [8]
    assert graph.code == code


@pytest.mark.parametrize(("frozen", "expected"), [(0, ["freeze", "unfreeze"]), (5, [])])
def test_objects_frozen_by_the_caller_stay_frozen(monkeypatch, frozen, expected):
    calls = []
    monkeypatch.setattr(channel_groups.gc, "get_freeze_count", lambda: frozen)
    for name in ("freeze", "unfreeze"):
        monkeypatch.setattr(channel_groups.gc, name, lambda name=name: calls.append(name))
    with _existing_objects_not_collected():
        pass
    assert calls == expected


class Gained(nn.Module):
    """Has a scalar parameter, and a split followed by a norm with weights."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.layers = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
        self.norm = nn.RMSNorm(8)
        self.classifier = nn.Linear(32, 5)

    def forward(self, images):
        features = self.layers(images).mean((2, 3)) * self.gain
        return self.classifier(self.norm(features.view(-1, 4, 8)).flatten(1))


def test_networks_with_scalar_parameters_and_norms_after_a_split_are_pruned():
    images = torch.randn(2, 3, 8, 8)
    pruned = tersor.prune(nn.Sequential(Gained()).eval(), [images], keep_macs=0.6)
    assert pruned.get_submodule("0.layers.0").out_channels < 32
    assert pruned(images).shape == (2, 5)


@pytest.mark.parametrize("cut", [lambda x: x.split([8, 24], 1), lambda x: (x[:, :8], x[:, 8:])], ids=["split", "slice"])
def test_every_part_of_a_split_keeps_a_channel(cut):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Conv2d(3, 32, 1), nn.Linear(32, 5)

        def forward(self, x):
            one, two = cut(self.first(x).relu())
            return self.head(torch.cat([F.avg_pool2d(one, 2), F.max_pool2d(two, 2)], 1).mean((2, 3)))

    torch.manual_seed(0)
    network = Parts().eval()
    nn.init.constant_(network.first.weight[:8], 0.01)  # the channels of the first part are the least important ones
    images = torch.rand(2, 3, 4, 4)
    groups, _ = coupled_channels(capture(network, images), images)
    assert [len(group.slices) for group in groups] == [8, 24]
    pruned = tersor.prune(network, images, scope="global", round_to=1, keep_macs=0.3)
    assert 2 <= pruned.first.out_channels < 24
    assert pruned(images).shape == (2, 5)


def test_channels_used_differently_from_all_others_cannot_be_removed():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Conv2d(3, 2, 1), nn.Conv2d(1, 4, 1), nn.Conv2d(1, 4, 1)

        def forward(self, x):
            x = self.first(x)
            return self.second(x[:, :1]) + self.third(x[:, 1:])

    images = torch.rand(1, 3, 4, 4)
    groups, unprunable = coupled_channels(capture(One().eval(), images), images)
    assert groups == []
    reason = "each of them is used in a different way, and at least one channel per use has to remain"
    assert unprunable["first"] == reason
