from __future__ import annotations

import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import fx, nn

from tersor.core.target import Target
from tersor.deploy.integer_graph import IntegerLayer, QuantizeDequantize, to_integer_graph
from tersor.deploy.onnx import export
from tersor.methods.ptq import PTQ
from tersor.training.context import AttachContext


class Pair(nn.Module):
    """A convolution (or another `layer`) and the modules after it."""

    def __init__(self, layer, *behind):
        super().__init__()
        self.layer = layer
        self.behind = nn.ModuleList(behind)

    def forward(self, x):
        x = self.layer(x)
        for module in self.behind:
            x = module(x)
        return x


def quantize(model, x, **options):
    attached = PTQ(**options).attach(model.eval(), AttachContext(data=[x], target=Target(cpu="vnni")))
    attached.begin()
    return attached.model


def weight_and_bias(layer: IntegerLayer):
    shape = (-1, *[1] * (layer.weight.ndim - 1))
    zero_point = torch.zeros_like(layer.scale) if layer.zero_point is None else layer.zero_point.float()
    weight = (layer.weight.float() - zero_point.reshape(shape)) * layer.scale.reshape(shape)
    if layer.integer_bias is None:
        return weight, layer.bias
    return weight, layer.integer_bias.double() * layer.bias_scale


def images(count=6, seed=1):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


awkward = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-12, -1e-12, 1e-30, 1e3, -0.3])


@given(
    st.lists(awkward, min_size=4, max_size=4),
    st.lists(st.sampled_from([0.0, 0.5, -4.0, 1e-9]), min_size=4, max_size=4),
    st.booleans(),
    st.sampled_from([8, 4, 2]),
    st.sampled_from(["symmetric", "channel", "tensor"]),
)
@example(gamma=[0.0] * 4, beta=[0.0] * 4, bias=False, bits=8, kind="symmetric")
@example(gamma=[1e-12, -1e-12, 1e-30, 0.0], beta=[0.5, -4.0, 0.5, 0.5], bias=True, bits=8, kind="symmetric")
@example(gamma=[1.0, -1.0, -0.3, 1e-12], beta=[0.5] * 4, bias=True, bits=8, kind="channel")
@example(gamma=[1.0, -1.0, -0.3, 0.0], beta=[0.5] * 4, bias=True, bits=8, kind="tensor")
@settings(max_examples=40)
def test_batchnorm_is_folded_within_the_rounding_error_of_the_bias(on_affine_grids, gamma, beta, bias, bits, kind):
    torch.manual_seed(0)
    model = Pair(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    norm = model.behind[0]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(gamma))
        norm.bias.copy_(torch.tensor(beta))
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.01, 4)
    graph = quantize(model, images(), bits=bits, first_last_bits=bits)
    if kind != "symmetric":
        on_affine_grids(graph, bits, per_tensor=kind == "tensor")
    x = graph.get_submodule("quantizers.x")(images())
    expected = norm(graph.layer(x)).double()

    layer = to_integer_graph(graph).layer
    assert isinstance(layer, IntegerLayer)
    assert layer.weight.dtype == torch.int8
    if kind == "symmetric":
        assert layer.zero_point is None
        assert layer.weight.abs().max() <= 2 ** (bits - 1) - 1
    assert (layer.scale > 0).all()
    assert torch.isfinite(layer.scale).all()
    weight, shift = weight_and_bias(layer)
    found = F.conv2d(x.double(), weight.double(), shift)
    # the bias is rounded to the grid of the products: that step bounds the difference
    step = torch.zeros(4) if layer.bias_scale is None else layer.bias_scale
    bound = 0.51 * step[:, None, None] + 1e-5 * expected.abs().amax((0, 2, 3))[:, None, None] + 1e-7
    assert ((found - expected).abs() <= bound).all()


def test_folding_keeps_the_integers_and_a_negative_gamma_flips_their_sign():
    torch.manual_seed(0)
    model = Pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        model.behind[0].weight.copy_(torch.tensor([1.0, -1.0, 0.2, -30.0]))
    graph = quantize(model, images())
    scale = graph.layer.parametrizations.weight[0].scale
    integers = torch.round(graph.layer.weight / scale[:, None, None, None])
    signs = torch.tensor([1, -1, 1, -1])[:, None, None, None]
    assert torch.equal(to_integer_graph(graph).layer.weight.float(), integers * signs)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_a_negative_gamma_mirrors_affine_integers_within_their_grid(on_affine_grids, per_tensor):
    torch.manual_seed(0)
    model = Pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        model.behind[0].weight.copy_(torch.tensor([1.0, -1.0, 0.2, -30.0]))
    graph = on_affine_grids(quantize(model, images()), 8, per_tensor=per_tensor)
    quantizer = graph.layer.parametrizations.weight[0]
    zero_point = quantizer.zero_point.expand(4)
    integers = torch.round(graph.layer.weight / quantizer.scale.expand(4)[:, None, None, None])
    integers += zero_point[:, None, None, None]
    layer = to_integer_graph(graph).layer
    for channel, mirrored in enumerate([False, True, False, True]):
        q, z = integers[channel], zero_point[channel]
        assert torch.equal(layer.weight[channel].float(), -1 - q if mirrored else q)
        assert layer.zero_point[channel] == (-1 - z if mirrored else z)


@pytest.mark.parametrize("bits", [7, 4, 2])
def test_affine_weights_that_fit_into_int8_are_stored_without_a_zero_point(on_affine_grids, bits):
    torch.manual_seed(0)
    graph = on_affine_grids(quantize(Pair(nn.Conv2d(3, 4, 3)), images()), bits, per_tensor=False)
    quantizer = graph.layer.parametrizations.weight[0]
    assert quantizer.zero_point.any()
    layer = to_integer_graph(graph).layer
    assert layer.zero_point is None
    assert torch.equal(layer.weight.float() * quantizer.scale[:, None, None, None], graph.layer.weight)


def test_a_channel_with_zero_gamma_keeps_its_bias_exactly():
    torch.manual_seed(0)
    model = Pair(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        model.layer.weight[1] = 0
        model.behind[0].weight.copy_(torch.tensor([0.0, 1.0, 1e-14]))
        model.behind[0].bias.copy_(torch.tensor([0.123456, 0.3, 0.654321]))
    graph = quantize(model, images())
    _, shift = weight_and_bias(to_integer_graph(graph).layer)
    exact = graph.behind.get_submodule("0")(graph.layer(images()))[0, :, 0, 0].double()
    torch.testing.assert_close(shift, exact, rtol=1e-6, atol=0)


def modules_of(graph, kind):
    network = to_integer_graph(graph)
    assert isinstance(network, fx.GraphModule)
    used = {node.target for node in network.graph.nodes if node.op == "call_module"}
    return {name: module for name, module in network.named_modules() if name in used and isinstance(module, kind)}


def test_the_batchnorm_is_removed_and_the_original_network_is_not_changed():
    model = Pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    graph = quantize(model, images())
    before = graph(images())
    keys, code = list(graph.state_dict()), graph.code
    assert not modules_of(graph, nn.BatchNorm2d)
    assert torch.equal(graph(images()), before)
    assert list(graph.state_dict()) == keys
    assert graph.code == code


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(4, track_running_stats=False), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4)],
    ids=lambda norm: type(norm).__name__,
)
def test_a_batchnorm_without_statistics_is_not_folded(norm):
    graph = quantize(Pair(nn.Conv2d(3, 4, 3), norm), images())
    assert modules_of(graph, type(norm))


def test_a_batchnorm_without_gamma_is_folded():
    torch.manual_seed(0)
    model = Pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))
    model.behind[0].running_var.uniform_(0.1, 3)
    model.behind[0].running_mean.normal_()
    graph = quantize(model, images())
    x = graph.get_submodule("quantizers.x")(images())
    layer = to_integer_graph(graph).layer
    weight, shift = weight_and_bias(layer)
    difference = F.conv2d(x.double(), weight.double(), shift) - graph.behind.get_submodule("0")(graph.layer(x))
    assert (difference.abs() <= 0.51 * layer.bias_scale[:, None, None] + 1e-5).all()


class BothReadTheConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.layer(x)
        return self.norm(x) + x


class Twice(nn.Module):
    """One convolution, two norms and two inputs."""

    def __init__(self):
        super().__init__()
        self.layer, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.second(self.layer(F.relu(self.first(self.layer(x)))))


def test_a_batchnorm_is_not_folded_if_its_input_is_used_elsewhere():
    assert modules_of(quantize(BothReadTheConvolution(), images()), nn.BatchNorm2d)


def test_each_call_of_a_layer_has_its_own_batchnorm_and_input_scale():
    graph = quantize(Twice(), images())
    assert not modules_of(graph, nn.BatchNorm2d)
    layers = modules_of(graph, IntegerLayer)
    assert set(layers) == {"layer", "layer.2"}
    first, second = (each.bias_scale / each.scale for each in layers.values())
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("flat", "integers"), [(nn.Flatten(), 1), (nn.Flatten(2), 0)])
def test_the_bias_of_a_matrix_product_over_tokens_is_stored_in_float(flat, integers, tmp_path):
    x = images()
    graph = quantize(nn.Sequential(flat, nn.Linear(36 if integers == 0 else 108, 8)), x)
    stored = onnx.load(export(graph, x, tmp_path / "model.onnx")).graph.initializer
    kinds = [onnx.TensorProto.DataType.Name(each.data_type) for each in stored if [*each.dims] == [8]]
    assert kinds.count("INT32") == integers
    assert kinds.count("FLOAT") == 2, "the scales of the weight, and the bias or its scales"


@pytest.mark.parametrize("between", [nn.Dropout(0.5), nn.Identity(), nn.Dropout2d(0.1)], ids=lambda m: type(m).__name__)
def test_modules_that_are_identities_in_eval_mode_do_not_hide_the_input_scale(between):
    torch.manual_seed(0)
    graph = quantize(Pair(nn.Conv2d(3, 4, 3), nn.ReLU(), between, nn.Conv2d(4, 2, 1)), images())
    layer = to_integer_graph(graph).behind.get_submodule("2")
    assert layer.integer_bias.dtype == torch.int32
    expected = layer.scale * graph.get_submodule("quantizers.behind_0").scale
    torch.testing.assert_close(layer.bias_scale, expected)


def test_an_excluded_layer_is_not_replaced():
    graph = quantize(Pair(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), images(), exclude=("layer",))
    network = to_integer_graph(graph)
    assert type(network.layer) is nn.Conv2d
    assert isinstance(network.behind.get_submodule("1"), IntegerLayer)


def test_disabled_quantizers_have_no_effect():
    model = Pair(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    before = model(images())
    graph = PTQ().attach(model, AttachContext(data=[images()])).model
    assert torch.equal(to_integer_graph(graph)(images()), before)


def test_quantizers_are_replaced_by_quantize_dequantize_modules():
    graph = quantize(Pair(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), images())
    found = modules_of(graph, QuantizeDequantize)
    assert set(found) == {"quantizers.x", "quantizers.behind_0", "quantizers.behind_1"}
    for name, module in found.items():
        assert module.scale == graph.get_submodule(name).scale
        assert module.zero_point.dtype == torch.uint8
        assert module.zero_point == graph.get_submodule(name).zero_point
