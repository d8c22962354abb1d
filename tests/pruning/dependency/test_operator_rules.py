"""Every operator rule, in one network with a branch for each operator: which channels of a convolution can be removed.

A branch is a convolution with 8 channels, an operator, and a linear layer. `GROUPS` has the size of every group of the
branch, worked out by hand; `FROZEN` has the reason why none can be removed.
"""

import copy
import warnings
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor.graph.capture import capture
from tersor.pruning.channel_groups import coupled_channels, merge_cuts, remove


class Learned(nn.Module):
    """A function of the channels and a learned tensor."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function, self.tensor = function, nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.function(x, self.tensor)


class ChannelsLast(nn.Module):
    """A layer over the last dimension."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.permute(0, 2, 3, 1))


def tokens(x):
    return x.flatten(2).transpose(1, 2)


GROUPS = {
    # (N, 8, 4, 4) -> anything whose channels a linear layer reads
    "scale of lower rank": (Learned(torch.mul, 8, 1, 1), [8]),
    "gate": (lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), [8]),
    "sum over channels": (lambda x: x.sum(1), [8]),
    "sum, dimension kept": (lambda x: x.sum((1, 2), keepdim=True), [8]),
    "norm over channels": (lambda x: torch.linalg.vector_norm(x, dim=1), [8]),
    "norm over pixels": (lambda x: torch.linalg.vector_norm(x, dim=(2, 3)), [8]),
    "maximum over rows": (lambda x: x.max(2).values, [8]),
    "maximum, negative dimension": (lambda x: x.amax(-1, keepdim=True), [8]),
    "softmax over pixels": (lambda x: x.softmax(-1), [8]),
    "slice": (lambda x: x[:, 2:5], [5, 3]),
    "slice to the end": (lambda x: x[:, -2:], [6, 2]),
    "all but one": (lambda x: x[:, 1:], [7]),
    "chunk": (lambda x: torch.mul(*x.chunk(2, 1)), [4]),
    "glu of unequal parts": (lambda x: torch.cat(x.split([3, 5], 1)[::-1], 1), [3, 5]),
    "concatenation": (
        lambda x: torch.cat([x, x.sigmoid(), torch.ones(1, 2, 1, 1).expand(x.shape[0], -1, 4, 4)], 1),
        [8],
    ),
    "concatenation of rows": (lambda x: torch.cat([x, x.neg()], -1), [8]),
    "stack": (lambda x: torch.stack([x, x.neg()], 2), [8]),
    "stack in front of the channels": (lambda x: torch.stack([x, x.neg()], -4).sum(1), [8]),
    "constant pad": (lambda x: F.pad(x, (1, 0, 0, 2, 3, 1)), [8]),
    "repeat": (lambda x: x.repeat(1, 3, 1, 2), [8]),
    "repeat to a higher rank": (lambda x: x.mean((2, 3)).repeat(2, 1, 3).sum(0), [8]),
    "expand": (lambda x: x.mean((2, 3), keepdim=True).expand(-1, 8, 2, 3), [8]),
    "expand to a higher rank": (lambda x: x[None].expand(2, -1, -1, -1, -1).sum(0), [8]),
    "unflatten": (lambda x: x.unflatten(1, (2, 4)).amax(1), [4]),
    "merge with pixels": (lambda x: x.permute(0, 2, 1, 3).flatten(1, 2), [8]),
    "split and merge": (lambda x: x.reshape(-1, 2, 4, 16).transpose(1, 2).reshape(x.shape[0], 8, 16), [4]),
    "squeeze": (lambda x: x.mean(2, keepdim=True).squeeze(2).unsqueeze(1), [8]),
    "movedim": (Learned(lambda x, scale: x.movedim(1, -1) * scale, 8), [8]),
    "movedim to the front": (lambda x: x.movedim(-1, 1).movedim(2, 3).sum(1), [8]),
    "roll of rows": (lambda x: x.roll(1, 2), [8]),
    "flip of columns": (lambda x: x.flip(-1), [8]),
    "repeated rows": (lambda x: x.repeat_interleave(2, 2), [8]),
    "matrix product": (Learned(lambda x, matrix: tokens(x) @ matrix, 8, 3), [8, 3]),
    "product of pixels": (lambda x: (x.flatten(2) @ tokens(x).tanh()).sum(2), [8]),
    "batched product": (lambda x: torch.bmm(tokens(x), x.flatten(2)), [8]),
    "einsum": (lambda x: torch.einsum("nchw, ncvw -> nhv", x, x.sigmoid()), [8]),
    "einsum that keeps them": (lambda x: torch.einsum("nchw,nc->nch", x, x.mean((2, 3))), [8]),
    "attention": (lambda x: F.scaled_dot_product_attention(tokens(x), tokens(x).sin(), tokens(x).cos()), [8]),
    "masked attention": (
        lambda x: F.scaled_dot_product_attention(*[tokens(x)] * 3, attn_mask=torch.ones(16, 16).tril().bool()),
        [8],
    ),
    "scaled attention": (lambda x: F.scaled_dot_product_attention(*[tokens(x)] * 3, scale=0.5), [8]),
    "layer norm": (lambda x: F.layer_norm(tokens(x), (8,)), [8]),
    "pooled, with indices": (lambda x: F.adaptive_max_pool2d(x, 2), [8]),
    "interpolated": (lambda x: F.interpolate(x, scale_factor=2.0), [8]),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), [2]),
    "transposed convolution": (nn.ConvTranspose2d(8, 6, 2, 2), [8, 6]),
    "depthwise convolution": (nn.Conv2d(8, 8, 3, groups=8), [8]),
    "linear": (Learned(lambda x, weight: F.linear(tokens(x), weight, weight.sum(1)), 5, 8), [8, 5]),
    "few groups": (nn.Conv2d(8, 12, 1, groups=2), [4, 6]),
    "many groups": (nn.Conv2d(8, 16, 1, groups=4), [4]),
    "group norm": (nn.GroupNorm(2, 8), [4]),
    "group norm of pairs": (nn.GroupNorm(4, 8), [4]),
    "instance norm": (nn.InstanceNorm2d(8, affine=True), [8]),
    "RMS norm": (ChannelsLast(nn.RMSNorm(8)), [8]),
    "layer norm layer": (ChannelsLast(nn.LayerNorm(8)), [8]),
    "learned slopes": (nn.PReLU(8), [8]),
    "softmax layer": (nn.Softmax(2), [8]),
    "pixel shuffle layer": (nn.PixelShuffle(2), [2]),
    "unflatten layer": (nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (2, 8)), nn.Flatten()), [8]),
    "upsampling layer": (nn.Upsample(scale_factor=2), [8]),
}
FROZEN = {
    "mean over channels": (lambda x: x.mean(1), "reduces over them"),
    "maximum of all": (lambda x: x.sum() + x[:, :0].flatten(1), "reduces over all of them"),
    "softmax": (lambda x: x.softmax(1), "combines them"),
    "cumulative sum": (lambda x: x.cumsum(1), "combines them"),
    "every second": (lambda x: x[:, 1::2], "slices them with a step of 2"),
    "one": (lambda x: x[:, 3], "selects one of them by its index"),
    "by index": (lambda x: x[:, [1, 3]], "an operator that"),
    "unbound": (lambda x: x.unbind(1)[0] - x.unbind(1)[1], "unbinds them"),
    "roll": (lambda x: x.roll(1, 1), "moves them"),
    "flip": (lambda x: x.flip([1]), "moves them"),
    "repeated": (lambda x: x.repeat_interleave(2, 1), "repeats them"),
    "reflected": (lambda x: F.pad(tokens(x), (1, 1), "reflect"), "pads them"),
    "cropped": (lambda x: F.pad(x, (0, 0, 0, 0, -1, 0)), "pads them"),
    "pairs": (lambda x: (x.flatten(2) @ tokens(x)).flatten(1), "merges two dimensions of channels"),
    "norm over all": (lambda x: F.layer_norm(x, (8, 4, 4)), "an operator that"),
    "product with a vector": (lambda x: tokens(x) @ torch.arange(8.0), "an operator that"),
    "pooled": (lambda x: F.max_pool1d(tokens(x), 2), "pools them"),
    "product with a fixed size": (lambda x: tokens(x) @ torch.ones(8, 2), "combines them with a tensor of fixed size"),
    "sorted": (lambda x: x.sort(1).values, "an operator that"),
    "grouped transposed": (nn.ConvTranspose2d(8, 8, 2, groups=2), "is a grouped transposed convolution"),
    "layer norm over all": (nn.LayerNorm((8, 4, 4)), "an operator that"),
    "response norm": (nn.LocalResponseNorm(2), "an operator that"),
}


class Branches(nn.Module):
    """Every operator, each with its own channels."""

    def __init__(self, images):
        super().__init__()
        operators = {name: each[0] for name, each in {**GROUPS, **FROZEN}.items()}
        self.names = {f"b{number}": name for number, name in enumerate(operators)}
        self.operators = dict(zip(self.names, operators.values(), strict=True))
        self.layers = nn.ModuleDict({n: each for n, each in self.operators.items() if isinstance(each, nn.Module)})
        self.convs = nn.ModuleDict({name: nn.Conv2d(3, 8, 1) for name in self.names})
        self.heads = nn.ModuleDict({name: nn.LazyLinear(2) for name in self.names})
        self(images)

    def forward(self, x):
        return [self.heads[name](self.applied(name, self.convs[name](x)).flatten(1)) for name in self.names]

    def applied(self, name, x):
        return self.layers[name](x) if name in self.layers else self.operators[name](x)


@cache
def found():
    torch.manual_seed(0)
    images = torch.randn(3, 3, 4, 4)
    model = Branches(images).eval()
    graph = capture(model, images)
    groups, unprunable = coupled_channels(graph, images)
    return model.names, graph, groups, unprunable


def by_branch(names, roots):
    """Branch -> values, from (root, value)."""
    branches = {name: [] for name in names.values()}
    for root, value in roots:
        branches[names[root.split(".")[1]]].append(value)
    return branches


def test_removable_channels_of_every_operator():
    names, _, groups, _ = found()
    sizes = by_branch(names, [(group.root, len(group.slices)) for group in groups])
    expected = {**{name: each for name, (_, each) in GROUPS.items()}, **{name: [] for name in FROZEN}}
    assert {name: sorted(each) for name, each in sizes.items()} == {name: sorted(expected[name]) for name in expected}


def test_the_reason_why_channels_of_an_operator_cannot_be_removed():
    names, _, _, unprunable = found()
    reasons = by_branch(names, [(root, why) for root, why in unprunable.items() if root.startswith("convs")])
    wrong = {name: each for name, each in reasons.items() if FROZEN.get(name, (0, ""))[1] not in "".join(each)}
    assert wrong == {}
    assert {name for name, each in reasons.items() if each} == set(FROZEN)


def test_removal_equals_masking_for_every_operator():
    names, graph, groups, _ = found()
    images = torch.randn(3, 3, 4, 4)
    pruned, masked = copy.deepcopy(graph), copy.deepcopy(graph)
    cuts = merge_cuts(cut for group in groups for cut in group.cuts(range(0, len(group.slices), 2)))
    remove(pruned, cuts)
    for cut in cuts:
        places = torch.tensor(cut.channels)
        if cut.axis.isdecimal():
            masked.get_parameter(cut.layer).data.index_fill_(int(cut.axis), places, 0)
        elif cut.axis in {"in", "out"} and getattr(layer := masked.get_submodule(cut.layer), "groups", 1) == 1:
            for tensor in [layer.weight] if cut.axis == "in" else layer.parameters():
                columns = tensor.ndim > 1 and (cut.axis == "in") != isinstance(layer, nn.ConvTranspose2d)
                tensor.data.index_fill_(int(columns), places, 0)
    pairs = zip(names.values(), pruned(images), masked(images), strict=True)
    different = {name for name, output, expected in pairs if not torch.allclose(output, expected, atol=1e-5)}
    assert different == {"layer norm", "layer norm layer", "RMS norm", "group norm"}, "they normalize across channels"


def test_an_instance_norm_without_weights_can_be_narrowed():
    torch.manual_seed(0)
    images = torch.randn(3, 3, 4, 4)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8), nn.Flatten(), nn.Linear(128, 2)).eval()
    graph = capture(network, images)
    (group,), _ = coupled_channels(graph, images)
    pruned, masked = copy.deepcopy(graph), copy.deepcopy(graph)
    remove(pruned, merge_cuts(group.cuts(range(0, 8, 2))))
    for parameter in masked.get_submodule("0").parameters():
        parameter.data[::2] = 0
    with warnings.catch_warnings():  # torch warns that the number of channels differs from that of the module
        warnings.simplefilter("error", UserWarning)
        assert torch.allclose(pruned(images), masked(images), atol=1e-5)


class Square(nn.Module):
    """As many positions as channels, all removable; the input of the layer is (N, C, L) or (N, L, C)."""

    def __init__(self, layer, *, channels_last):
        super().__init__()
        self.conv, self.mix, self.layer, self.last = nn.Conv2d(3, 8, 1), nn.Linear(16, 8), layer, channels_last
        self.over_positions, self.head = nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, x):
        x = self.mix(self.conv(x).flatten(2))
        x = self.layer(x.transpose(1, 2)).transpose(1, 2) if self.last else self.layer(x)
        return self.head(self.over_positions(x).transpose(1, 2))


@pytest.mark.parametrize("channels_last", [True, False], ids=["last", "first"])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm, nn.PReLU, nn.BatchNorm1d])
def test_the_weights_of_a_layer_belong_to_its_own_dimension(kind, channels_last):
    images = torch.randn(3, 3, 4, 4)
    graph = capture(Square(kind(8), channels_last=channels_last).eval(), images)
    groups, _ = coupled_channels(graph, images)
    of = {group.root: {cut.layer for cut in group.cuts([0])} for group in groups}
    of_channels = channels_last == (kind in {nn.LayerNorm, nn.RMSNorm})
    assert ("layer" in of["conv"], "layer" in of["mix"]) == (of_channels, not of_channels)


class Reduced(nn.Module):
    """Features (N, 16) or a map (N, 16, H, W), which the layer interprets as an input without a batch dimension."""

    def __init__(self, layer, *, features):
        super().__init__()
        self.conv, self.layer, self.features = nn.Conv2d(3, 16, 3, padding=1), layer, features
        self.head = nn.LazyLinear(2)

    def forward(self, x):
        x = self.conv(x)
        return self.head(self.layer(x.mean((2, 3)) if self.features else x).flatten(1))


@pytest.mark.parametrize(
    ("layer", "features"),
    [
        (nn.MaxPool1d(2), True),
        (nn.AdaptiveAvgPool1d(8), True),
        (nn.MaxPool3d((2, 1, 1)), False),
        (nn.ConstantPad3d((0, 0, 0, 0, 4, 4), 0.0), False),
    ],
    ids=lambda each: type(each).__name__,
)
def test_channels_that_a_layer_interprets_as_another_dimension_are_not_removable(layer, features):
    images = torch.randn(3, 3, 4, 4)
    network = Reduced(layer, features=features)
    network(images)
    groups, unprunable = coupled_channels(capture(network.eval(), images), images)
    assert not groups
    assert "in a way that channel removal does not support" in unprunable["conv"] or "operator" in unprunable["conv"]
