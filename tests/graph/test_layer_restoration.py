from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor.graph.aten import arguments, operator_name
from tersor.graph.capture import capture, layer_of

IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class SameConv(nn.Conv2d):
    """Pads its input as TensorFlow does."""

    def forward(self, images):
        return F.conv2d(F.pad(images, (1, 1, 1, 1)), self.weight, self.bias, self.stride)


class BatchNormAct(nn.BatchNorm2d):
    def forward(self, images):
        return F.relu(super().forward(images))


class Function(nn.Module):
    """A function of the images and its own weight."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.function = function
        self.inner = nn.Module()
        for name, shape in zip(("weight", "bias"), shapes, strict=False):
            setattr(self.inner, name, nn.Parameter(torch.randn(shape)))

    def forward(self, images):
        return self.function(images, *self.inner.parameters())


def along_channels(images, weight, bias=None):
    return F.linear(images.permute(0, 2, 3, 1), weight, bias)


RESTORED = {
    "subclass": (lambda: SameConv(4, 5, 3, stride=2), nn.Conv2d, "0"),
    "function": (lambda: Function(lambda x, w: F.conv2d(x, w, stride=2), (5, 4, 3, 3)), nn.Conv2d, "0.inner"),
    "function with groups and a bias": (
        lambda: Function(lambda x, w, b: F.conv2d(x, w, b, padding="same", groups=2), (6, 2, 3, 3), (6,)),
        nn.Conv2d,
        "0.inner",
    ),
    "transposed": (
        lambda: Function(lambda x, w: F.conv_transpose2d(x, w, stride=2, output_padding=1, groups=2), (4, 3, 3, 3)),
        nn.ConvTranspose2d,
        "0.inner",
    ),
    "linear": (lambda: Function(along_channels, (5, 4), (5,)), nn.Linear, "0.inner"),
    "BatchNorm": (lambda: BatchNormAct(4), nn.BatchNorm2d, "0"),
    "GroupNorm": (
        lambda: Function(lambda x, w, b: F.group_norm(x, 2, w, b, 1e-3), (4,), (4,)),
        nn.GroupNorm,
        "0.inner",
    ),
}


@pytest.mark.parametrize("kind", RESTORED)
def test_an_operator_is_restored_as_a_layer_with_the_same_parameters(kind):
    build, expected, path = RESTORED[kind]
    torch.manual_seed(0)
    model = nn.Sequential(build()).eval()
    graph = capture(model, IMAGES)
    layer = graph.get_submodule(path)
    assert type(layer) is expected
    assert {id(each) for each in layer.parameters()} == {id(each) for each in model.parameters()}
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == [path]
    assert torch.equal(graph(IMAGES), model(IMAGES))
    assert graph.state_dict().keys() == model.state_dict().keys()
    fresh = nn.Sequential(build()).eval()
    graph.load_state_dict(fresh.state_dict())
    assert torch.equal(graph(IMAGES), fresh(IMAGES))
    assert torch.equal(copy.deepcopy(graph)(IMAGES), fresh(IMAGES))


def test_a_batchnorm_with_its_own_forward_trains_like_the_original():
    model = nn.Sequential(BatchNormAct(4)).train()
    graph = capture(copy.deepcopy(model), IMAGES)
    assert torch.equal(graph(IMAGES), model(IMAGES))
    torch.testing.assert_close(graph.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert graph.get_submodule("0").num_batches_tracked == 1


class TwoGeometries(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x):
        return F.conv2d(F.conv2d(x, self.weight, padding=1), self.weight, padding=2, dilation=2)


def test_a_weight_used_with_two_geometries_is_captured_correctly():
    model = TwoGeometries()
    graph = capture(model, IMAGES)
    assert torch.equal(graph(IMAGES), model(IMAGES))
    (convolution,) = (node for node in graph.graph.nodes if operator_name(node) == "conv2d")
    assert arguments(convolution)["dilation"] == [2, 2]
    assert graph.state_dict().keys() == model.state_dict().keys()
    fresh = TwoGeometries()
    graph.load_state_dict(fresh.state_dict())
    assert torch.equal(graph(IMAGES), fresh(IMAGES))


def test_a_weight_shared_with_a_transposed_convolution_is_captured_correctly():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Conv2d(4, 4, 3)

        def forward(self, x):
            return F.conv_transpose2d(self.encoder(x), self.encoder.weight)

    model = Tied().eval()
    graph = capture(model, IMAGES)
    assert torch.equal(graph(IMAGES), model(IMAGES))
    assert "conv_transpose2d" in [operator_name(node) for node in graph.graph.nodes]


def test_a_batchnorm_with_a_computed_weight_is_kept_as_an_operator():
    class Shifted(nn.BatchNorm2d):
        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, 1 + self.weight, self.bias)

    model = nn.Sequential(nn.Conv2d(4, 4, 1), Shifted(4)).eval()
    graph = capture(model, IMAGES)
    assert torch.allclose(graph(IMAGES), model(IMAGES), atol=1e-6)
    assert "batch_norm" in [operator_name(node) for node in graph.graph.nodes]


class ComputedBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, x):
        x = x.mean((2, 3))
        return F.linear(x, self.linear.weight, self.linear.bias * x.mean())


def test_a_bias_that_depends_on_the_images_is_added_after_the_layer():
    model = ComputedBias()
    graph = capture(model, IMAGES)
    torch.testing.assert_close(graph(IMAGES), model(IMAGES))
    (layer,) = (layer_of(node) for node in graph.graph.nodes if isinstance(layer_of(node), nn.Linear))
    assert layer.weight is model.linear.weight
    assert layer.bias is None


class Buffers(nn.Module):
    """Normalizes with buffers that do not belong to a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.rand(4))
        self.register_buffer("var", torch.rand(4) + 0.5)

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var)


@pytest.mark.filterwarnings("ignore:the forward method of Sequential draws random numbers")
@pytest.mark.parametrize(
    ("build", "operator"),
    [
        (lambda: Function(lambda x, w: F.conv2d(x, w * x.mean()), (5, 4, 1, 1)), "conv2d"),
        (lambda: Function(lambda x, w, b: F.conv2d(x, w, b * x.mean()), (5, 4, 1, 1), (5,)), "conv2d"),
        (lambda: Function(lambda x, w: F.linear(x, w * x.mean()), (5, 6)), "linear"),
        (Buffers, "batch_norm"),
        (lambda: Function(lambda x: F.group_norm(x, 2)), "group_norm"),
        (lambda: Function(lambda x, w: F.group_norm(x, 2, w), (4,)), "group_norm"),
        (lambda: Function(lambda x: F.dropout(x, 0.0, training=True)), "dropout"),
    ],
)
def test_an_operator_that_no_layer_can_compute_is_kept(build, operator):
    torch.manual_seed(0)
    model = nn.Sequential(build()).eval()
    graph = capture(model, IMAGES)
    assert operator in [operator_name(node) for node in graph.graph.nodes]
    assert not [node for node in graph.graph.nodes if node.op == "call_module"]
    torch.testing.assert_close(graph(IMAGES), model(IMAGES))


class TwoInputs(nn.Module):
    """A torch module with two inputs, here the same tensor twice."""

    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(6, 6, 3)

    def forward(self, x):
        return self.bilinear(x, x)


class LargerOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, 3, stride=2)

    def forward(self, x):
        return self.up(x, output_size=(14, 14))


@pytest.mark.parametrize("kind", [TwoInputs, LargerOutput])
def test_calls_with_several_inputs_or_larger_outputs_are_captured_correctly(kind):
    model = kind()
    graph = capture(model, IMAGES)
    assert torch.equal(graph(IMAGES), model(IMAGES))
    assert graph.state_dict().keys() == model.state_dict().keys()


def test_modules_of_torch_are_kept_as_the_same_objects():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Hardswish(), nn.MaxPool2d(2), nn.Flatten())
    graph = capture(model, IMAGES)
    assert [layer_of(node) for node in graph.graph.nodes if node.op == "call_module"] == list(model)


def test_a_hook_is_recorded_as_operators():
    model = nn.Sequential(nn.Conv2d(4, 4, 1))
    model[0].register_forward_hook(lambda _module, _inputs, output: 2 * output)
    graph = capture(model, IMAGES)
    assert [operator_name(node) or node.target for node in graph.graph.nodes] == ["input", "0", "mul", "output"]
    assert torch.equal(graph(IMAGES), model(IMAGES))


class Standardized(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight / self.weight.std(), self.bias, padding=1)


def test_uncomputed_weights_do_not_load_into_a_graph_with_computed_weights():
    torch.manual_seed(0)
    model = nn.Sequential(Standardized(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    images = torch.randn(2, 3, 6, 6)
    graph = capture(model, images)
    layers = [each for each in graph.modules() if isinstance(each, nn.Conv2d)]
    assert len(layers) == 2
    assert torch.allclose(layers[0].weight, model[0].weight / model[0].weight.std())
    with pytest.raises(RuntimeError, match="Missing key"):
        graph.load_state_dict(model.state_dict())
    before = graph(images)
    graph.load_state_dict(graph.state_dict())
    assert torch.equal(graph(images), before)
