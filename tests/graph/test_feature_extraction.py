from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor.core.errors import InputError
from tersor.core.target import Target
from tersor.data.network_inputs import TensorInputs
from tersor.graph.capture import capture
from tersor.graph.feature_extraction import (
    FeatureExtractor,
    as_map,
    channels_first,
    last_feature_maps,
    map_size,
    matching_paths,
    shapes_of,
)
from tersor.methods.channel_pruning import ChannelPruning
from tersor.methods.qat import QAT
from tersor.models import build
from tersor.training.context import AttachContext
from toy_networks import short


class Net(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace)
        self.stage = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.last = nn.Conv2d(16, 24, 3, padding=1)
        self.unused = nn.Identity()
        self.linear = nn.Linear(24, 10)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.stage(x) + x
        return self.linear(F.dropout(self.last(self.pool(x)), 0.5, self.training).mean((2, 3)))


def images(count=4):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_features_of_a_plain_network_are_the_outputs_of_its_modules():
    net = Net().eval()
    logits, given = FeatureExtractor(net, ["stage", "conv1"])(images())
    assert torch.equal(logits, net(images()))
    first = net.relu(net.bn1(net.conv1(images())))
    assert torch.equal(given["stage"], net.stage(first))
    assert torch.equal(given["conv1"], net.conv1(images()))
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("training", [False, True])
def test_a_captured_network_returns_the_same_features_as_the_original(training):
    net = Net().train(training)
    graph = capture(copy.deepcopy(net), images())
    torch.manual_seed(3)
    logits, given = FeatureExtractor(net, ["stage", "last"])(images())
    torch.manual_seed(3)
    of_graph, from_graph = FeatureExtractor(graph, ["stage", "last"])(images())
    assert torch.equal(logits, of_graph)
    assert all(torch.equal(given[path], from_graph[path]) for path in given)


def test_the_extractor_follows_the_mode_of_a_captured_network():
    graph = capture(Net().train(), images())
    extract = FeatureExtractor(graph, ["stage"])
    extract(images())
    graph.eval()
    assert torch.equal(extract(images())[0], graph(images()))  # without dropout, by running statistics


def test_features_are_found_after_channel_removal_and_quantization():
    graph = ChannelPruning(keep_macs=0.6, round_to=4).attach(Net().eval(), AttachContext(data=[images(32)])).model
    kept = shapes_of(graph, ["stage", "stage.0", "last"], images())
    assert kept["last"][1] == graph.get_submodule("last").out_channels
    assert kept["stage.0"][1] == graph.get_submodule("stage.0").out_channels
    attached = QAT().attach(graph, AttachContext(data=[images(32)], steps=1, target=Target(cpu="vnni")))
    attached.begin()
    logits, given = FeatureExtractor(attached.model, ["stage", "last"])(images())
    assert torch.equal(logits, attached.model(images()))
    assert given["stage"].shape == kept["stage"]
    sum(value.square().mean() for value in given.values()).backward()
    assert attached.model.get_submodule("stage.0").parametrizations.weight.original.grad.abs().sum() > 0


def test_a_value_that_is_overwritten_is_an_error():
    with pytest.raises(InputError, match="bn1 is changed in place"):
        FeatureExtractor(Net(inplace=True), ["bn1"])(images())
    with pytest.raises(InputError, match="bn1 is changed in place"):
        FeatureExtractor(capture(Net(inplace=True), images()), ["bn1"])(images())
    assert "bn1" not in last_feature_maps(capture(Net(inplace=True), images()), images())
    with torch.inference_mode():
        assert FeatureExtractor(Net(), ["bn1"])(images())[1]["bn1"].shape == (4, 16, 8, 8)


def test_a_layer_that_is_not_called_raises():
    with pytest.raises(InputError, match="unused is not called"):
        FeatureExtractor(Net(), ["unused"])(images())


def test_a_layer_whose_output_is_not_a_tensor_raises():
    class Twice(nn.Module):
        def forward(self, x):
            return x, x

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.linear = Twice(), nn.Linear(3 * 64, 10)

        def forward(self, x):
            return self.linear(self.twice(x)[0].flatten(1))

    with pytest.raises(InputError, match="twice is of type tuple, not a tensor"):
        FeatureExtractor(Outer(), ["twice"])(images())


def test_patterns_select_layers_and_unknown_layers_raise():
    net = build("resnet20", 10)
    assert matching_paths(net, ["layer?"], "the student") == ("layer1", "layer2", "layer3")
    graph = capture(net, torch.zeros(1, 3, 32, 32))
    assert matching_paths(graph, ["layer?"], "the student") == ("layer1", "layer2", "layer3")
    with pytest.raises(InputError, match=r"the teacher has no layer 'layer4'\. Did you mean 'layer\d'\?"):
        matching_paths(net, ["layer4"], "the teacher")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: short("resnet8"), ("layer1", "layer2", "layer3")),
        (lambda: build("wrn_16_1", 10), ("layer1", "layer2", "bn")),
        (lambda: build("resnet18", 10), ("relu", "layer1", "layer2", "layer3")),
        (lambda: short("mobilenet2"), ("features.1", "features.3", "features.6")),
        (lambda: short("regnet_y"), ("stem.2", "trunk_output.block1", "trunk_output.block2", "trunk_output.block3")),
        # the output of norm5 is changed in place by a ReLU; outputs of pooling are not used
        (
            lambda: short("densenet"),
            ("features.relu0", "features.denseblock1", "features.denseblock2", "features.denseblock3"),
        ),
    ],
)
def test_the_last_layer_at_each_resolution(make, expected):
    net = make()
    pictures = torch.randn(2, 3, 32, 32)
    assert last_feature_maps(net, pictures) == expected
    assert last_feature_maps(capture(net, pictures), pictures) == expected
    assert net.training


def test_tokens_are_converted_to_feature_maps():
    tokens = torch.randn(2, 17, 6)  # a class token before 4 x 4
    assert map_size(tokens.shape) == (4, 4)
    found = as_map(tokens)
    assert found.shape == (2, 6, 4, 4)
    assert torch.equal(found[0, :, 1, 2], tokens[0, 1 + 4 + 2])
    assert map_size(torch.Size([2, 6, 3])) is None
    assert map_size(torch.Size([2, 16 + 5, 3])) == (4, 4)  # four register tokens and the class token
    assert map_size(torch.Size([2, 16 + 6, 3])) is None
    assert map_size(torch.Size([2, 9 + 5, 3])) == (3, 3)
    assert map_size(torch.Size([2, 4 + 1, 3])) == (2, 2)
    assert map_size(torch.Size([2, 6])) is None


@pytest.mark.parametrize(
    ("shape", "sides", "expected"),
    [
        ((2, 16, 16, 96), (64, 64), (2, 96, 16, 16)),
        ((2, 7, 7, 768), (224, 224), (2, 768, 7, 7)),
        ((2, 5, 8, 24), (40, 64), (2, 24, 5, 8)),
        ((2, 96, 16, 16), (64, 64), (2, 96, 16, 16)),
        ((2, 16, 16, 16), (64, 64), (2, 16, 16, 16)),
        ((2, 24, 5, 8), (40, 64), (2, 24, 5, 8)),
        ((2, 512, 1, 1), (64, 64), (2, 512, 1, 1)),
        ((2, 3, 50, 64), (64, 64), (2, 3, 50, 64)),
        ((2, 50, 64), (64, 64), (2, 50, 64)),
    ],
)
def test_channels_first_moves_the_channels_of_channels_last_values(shape, sides, expected):
    value = torch.randn(shape)
    found = channels_first(value, torch.zeros(2, 3, *sides))
    assert found.shape == expected
    if shape != expected:
        assert torch.equal(found[1, 5, 2, 3], value[1, 2, 3, 5])


def test_the_first_input_with_four_dimensions_is_the_image():
    value, image = torch.randn(2, 5, 8, 24), torch.zeros(2, 3, 40, 64)
    for other in (torch.zeros(2), torch.zeros(2, 7)):
        assert channels_first(value, TensorInputs((other, image))).shape == (2, 24, 5, 8)
        assert channels_first(value, TensorInputs((other, other))).shape == value.shape


def test_feature_maps_of_a_swin_transformer_are_found():
    from torchvision.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    net = SwinTransformer([2, 2], 8, [1, 1], [1, 1], [2, 2], num_classes=10).eval()
    pictures = torch.randn(2, 3, 32, 32)
    seen = {}
    net.features[1].register_forward_hook(lambda _m, _i, value: seen.update(raw=value))
    for each in (net, capture(net, pictures)):
        assert last_feature_maps(each, pictures) == ("features.1", "features.3")
        assert shapes_of(each, ["features.1"], pictures)["features.1"] == (2, 8, 16, 16)
    _, given = FeatureExtractor(net, ["features.1"])(pictures)
    assert torch.equal(given["features.1"], seen["raw"].permute(0, 3, 1, 2))


class Odd(nn.Module):
    """Outputs that are not usable feature maps: of pooling, changed in place by ReLU, attention scores."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.scores = nn.Softmax(-1)
        self.linear = nn.Linear(32, 10)

    def forward(self, x):
        x = self.down(self.stem(x))
        x = F.relu(self.norm(x), inplace=True)
        pixels = x.flatten(2)
        scores = self.scores(pixels.transpose(1, 2).unsqueeze(1) @ pixels.unsqueeze(1)[..., :3])
        return self.linear(self.pool(x).flatten(1)) + scores.mean()


def test_outputs_that_are_not_feature_maps_are_skipped():
    pictures = torch.randn(2, 3, 16, 16)
    for each in (Odd(), capture(Odd(), pictures)):
        assert last_feature_maps(each, pictures) == ("stem", "down")
