"""The layers that ONNX Runtime computes in integers are those that `integer_coverage` reports."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tersor
from tersor.core.errors import CompressionWarning
from tersor.deploy.file_layers import file_layers
from tersor.evaluation import executed_precision
from tersor.evaluation.executed_precision import computed_in_float

IMAGES = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """Two layers and a classifier; `middle` is called between the layers and calls the second one."""

    def __init__(self, second, middle, *norms):
        super().__init__()
        self.first, self.second, self.classifier = nn.Conv2d(3, 16, 3, padding=1), second, nn.Linear(16, 10)
        self.norms = nn.ModuleList(norms)
        self.middle = middle

    def forward(self, images):
        features = self.middle(self, F.relu(self.first(images)))
        return self.classifier(features.mean((2, 3)))


def directly(network, features):
    return F.relu(network.second(features))


def called_twice(network, features):
    features = F.relu(network.norms[0](network.second(features)))
    return F.relu(network.norms[-1](network.second(F.max_pool2d(features, 2))))


def shifted(network, features):
    """Writes slices in place."""
    out = torch.zeros_like(features)
    out[:, :8, 1:], out[:, 8:, :-1] = features[:, :8, :-1], features[:, 8:, 1:]
    return F.relu(network.second(out))


def filled(network, features):
    out = features.new_zeros(features.shape)
    out.copy_(features)
    out[:, 0] = 1.0
    return F.relu(network.second(out))


def tokens_in_a_loop(network, features):
    tokens = features.flatten(2).mT
    for _ in range(3):
        tokens = tokens + network.second(tokens).tanh()
    return tokens.mT.unflatten(2, (16, 16))


def padded_conv(mode, **options):
    return nn.Conv2d(16, 16, 3, padding_mode=mode, **{"padding": 1, **options})


def norm(sign=1.0):
    made = nn.BatchNorm2d(16)
    with torch.no_grad():
        made.running_mean.uniform_(-0.5, 0.5)
        made.running_var.uniform_(0.5, 2)
        made.weight.uniform_(0.5, 2).mul_(sign)
        made.bias.uniform_(-0.5, 0.5)
    return made


class PaddedByAModule(nn.Conv2d):
    """Pads with a submodule, as in efficientnet_pytorch."""

    def __init__(self):
        super().__init__(16, 16, 3)
        self.static_padding = nn.ZeroPad2d((0, 2, 0, 2))

    def forward(self, images):
        return F.conv2d(self.static_padding(images), self.weight, self.bias)


def shared_weight(**options):
    """Two layers with one weight and different biases and `options`."""
    first, second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, **options)
    second.weight = first.weight
    return Network(first, lambda network, x: F.relu(network.norms[0](directly(network, x))), second)


def without_bias():
    return nn.Conv2d(16, 16, 3, padding=1, bias=False)


NETWORKS = {
    "reflect": lambda: Network(padded_conv("reflect"), directly),
    "replicate": lambda: Network(padded_conv("replicate"), directly),
    "circular": lambda: Network(padded_conv("circular"), directly),
    "uneven reflect": lambda: Network(nn.Conv2d(16, 16, 4, padding="same", padding_mode="reflect"), directly),
    "reflect, called twice": lambda: Network(padded_conv("reflect"), called_twice, norm()),
    "one norm, called twice": lambda: Network(without_bias(), called_twice, norm()),
    "two norms": lambda: Network(without_bias(), called_twice, norm(), norm()),
    "two norms, one negative": lambda: Network(without_bias(), called_twice, norm(), norm(-1.0)),
    "tokens in a loop": lambda: Network(nn.Linear(16, 16), tokens_in_a_loop),
    "slices written in place": lambda: Network(nn.Conv2d(16, 16, 3, padding=1), shifted),
    "padding module in a layer": lambda: Network(PaddedByAModule(), directly),
    "one weight, two biases": shared_weight,
    "one weight, two strides": lambda: shared_weight(stride=2),
    "filled in place": lambda: Network(nn.Conv2d(16, 16, 3, padding=1), filled),
}


class Features(nn.Module):
    """Returns an inner feature map and the output of a convolution with `channels` channels."""

    def __init__(self, channels):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, channels, 1)

    def forward(self, images):
        features = F.relu(self.second(F.relu(self.first(images))))
        return features, self.last(features)


def exported(network, folder, runtime="onnxruntime"):
    torch.manual_seed(0)
    quantized = tersor.quantize(network.eval(), IMAGES, runtime=runtime)
    return quantized, tersor.export(quantized, IMAGES, folder / "m.onnx", runtime=runtime)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_is_computed_in_integers(name, runtime, tmp_path):
    quantized, path = exported(NETWORKS[name](), tmp_path, runtime)
    assert tersor.integer_coverage(quantized, IMAGES).share == 1
    assert computed_in_float(path, runtime) == []


def test_a_small_output_convolution_stays_in_float_and_is_listed(tmp_path):
    quantized, path = exported(Features(5), tmp_path)
    (listed,) = tersor.integer_coverage(quantized, IMAGES).operators
    assert computed_in_float(path, "onnxruntime") == [listed.name] == ["last"]
    assert listed.reason == "ONNX Runtime has no integer convolution that returns float values"


def test_a_large_output_convolution_is_computed_in_integers(tmp_path):
    quantized, path = exported(Features(32), tmp_path)
    assert tersor.integer_coverage(quantized, IMAGES).share == 1
    assert computed_in_float(path, "onnxruntime") == []
    assert len(quantized(IMAGES)[1].unique()) <= 256


def test_linear_layers_on_tokens_are_listed_as_layers_of_the_file(tmp_path):
    _, path = exported(
        Network(nn.Linear(16, 24), lambda network, x: network.second(x.flatten(2).mT)[:, :, :16].mT[:, :, None]),
        tmp_path,
    )
    assert {each.name: (each.channels, each.bits) for each in file_layers(path)}["second"] == (24, 8)


def test_the_weights_of_a_layer_called_several_times_are_stored_once(tmp_path):
    _, path = exported(NETWORKS["two norms"](), tmp_path)
    weights = [each for each in onnx.load(path).graph.initializer if list(each.dims) == [16, 16, 3, 3]]
    assert len(weights) == 1


def test_a_layer_computed_in_float_but_not_listed_causes_a_warning(monkeypatch, tmp_path):
    quantized, path = exported(Features(5), tmp_path)
    coverage = executed_precision.integer_coverage
    monkeypatch.setattr(executed_precision, "integer_coverage", lambda *given: replace(coverage(*given), operators=()))
    with pytest.warns(
        CompressionWarning, match="onnxruntime computes these layers in float, .* as integers: last. They"
    ):
        tersor.export(quantized, IMAGES, path)


class Attention(nn.Module):
    """Multiplies activations in its forward method."""

    def __init__(self):
        super().__init__()
        self.values = nn.Conv2d(16, 16, 1)

    def forward(self, features):
        tokens = self.values(features).flatten(2)
        return (tokens @ (tokens.mT @ tokens).softmax(-1)).unflatten(2, features.shape[2:])


def test_a_listed_product_of_a_module_does_not_suppress_the_warning_for_its_layers(monkeypatch, tmp_path):
    quantized, path = exported(Network(Attention(), directly), tmp_path)
    assert {each.name for each in tersor.integer_coverage(quantized, IMAGES).operators} == {"second"}
    monkeypatch.setattr(executed_precision, "computed_in_float", lambda *_: ["first", "second.values"])
    with pytest.warns(CompressionWarning, match=r"in float, .* as integers: first, second\.values\. They"):
        tersor.export(quantized, IMAGES, path)


def test_for_a_float_network_no_layers_are_reported_as_computed_in_float(tmp_path):
    assert computed_in_float(tersor.export(Features(5).eval(), IMAGES, tmp_path / "m.onnx"), "onnxruntime") == []
