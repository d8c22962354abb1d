from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor.checkpoint.structure import rebuild, structure
from tersor.core.errors import InputError
from tersor.graph.capture import capture, layer_of
from tersor.graph.layer_selection import weighted_layers
from tersor.models import build
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid
from tersor.quantization.qdq_placement import (
    activation_quantizers,
    insert_activation_quantizers,
    is_nothing_in_eval,
    quantizable,
    source_of,
)

BYTES = Grid.unsigned(8)


IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def placed(model, runtime="onnxruntime", layers=None, images=IMAGES):
    """The graph, and the values that are quantized, as `value: quantizer`."""
    graph = capture(model.eval(), images)
    names = insert_activation_quantizers(graph, weighted_layers(graph) if layers is None else layers, BYTES, runtime)
    behind = {
        node.all_input_nodes[0].name: node.target.removeprefix("quantizers.")
        for node in graph.graph.nodes
        if isinstance(layer_of(node), FakeQuantize)
    }
    assert [name.removeprefix("quantizers.") for name in names] == list(dict.fromkeys(behind.values()))
    return graph, behind


class Residual(nn.Module):
    """A common residual block, with a convolution as shortcut."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.short, self.bn3 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 5)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)) + self.bn3(self.short(x)))
        return self.linear(y.mean((2, 3)))


def test_for_onnxruntime_the_output_of_every_integer_operator_is_quantized():
    _, behind = placed(Residual())
    assert list(behind) == ["x", "relu", "bn2", "bn3", "relu_1", "mean"]


def test_for_openvino_a_fused_addition_stays_in_float():
    _, behind = placed(Residual(), "openvino")
    assert list(behind) == ["x", "relu", "bn3", "relu_1", "mean"]


def test_for_openvino_a_value_of_an_addition_that_is_used_elsewhere_is_quantized():
    class Shared(Residual):
        def forward(self, x):
            y = self.bn1(self.conv1(x))
            z = y + self.bn3(self.short(x)).sigmoid()
            return y + self.conv2(z)

    _, behind = placed(Shared(), "openvino")
    assert "bn1" in behind, "the last addition reads it too"
    assert "conv2" not in behind


def test_layers_left_out_stay_in_float():
    _, behind = placed(Residual(), layers={"conv1", "conv2"})
    assert list(behind) == ["x", "relu", "bn2"]
    _, behind = placed(Residual(), layers={"linear"})
    assert list(behind) == ["mean"]


def test_inserted_quantizers_are_disabled():
    model = build("resnet20", 10).eval()
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    graph, behind = placed(model)
    assert torch.equal(graph(images), before)
    assert not any(module.enabled for module in graph.modules() if isinstance(module, FakeQuantize))
    assert "linear" not in behind, "logits are not rounded"


def test_a_shortcut_without_parameters_shares_the_quantizer():
    _, behind = placed(build("resnet20", 10))
    moved = {value: grid for value, grid in behind.items() if value.startswith(("getitem", "pad"))}
    assert moved
    assert set(moved.values()) <= {"layer1_2_relu_1", "relu_6", "relu_12", *behind.values()}
    for value, grid in moved.items():
        assert value != grid


class OnlyLogits(nn.Module):
    """The logits are the rearranged output (N, 5, 1, 1) of a convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 4)

    def forward(self, x):
        return torch.flatten(F.dropout(self.conv(x), training=self.training), 1)


def test_logits_are_not_quantized():
    _, behind = placed(OnlyLogits())
    assert list(behind) == ["x"]


class Shuffle(nn.Module):
    """Split, with layers on one side, concatenated and shuffled (ShuffleNet)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.side = nn.Conv2d(2, 2, 1)
        self.last = nn.Conv2d(4, 5, 1)

    def forward(self, x):
        left, right = self.conv(x).chunk(2, dim=1)
        y = torch.cat((left, self.side(right)), 1)
        n, _, h, w = x.shape
        y = y.view(n, 2, 2, h, w).transpose(1, 2).contiguous().view(n, 4, h, w)
        return self.last(y).mean((2, 3))


def test_parts_of_a_split_share_the_quantizer():
    model = Shuffle()
    images = torch.randn(2, 3, 4, 4)
    graph, behind = placed(model)
    assert "chunk" not in behind, "it gives a tuple"
    assert behind["getitem"] == behind["getitem_1"] == "conv"
    assert behind["view_1"] == "cat"
    for module in graph.modules():
        if isinstance(module, FakeQuantize):
            module.set_grid(torch.tensor(0.05), torch.tensor(128))
    assert graph(images).shape == (2, 5)


class Spread(nn.Module):
    """An operator with two outputs, one of which is used."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x):
        _, mean = torch.var_mean(x, (2, 3))
        return self.linear(mean)


def test_one_of_several_outputs_of_an_operator_is_quantized():
    graph, behind = placed(Spread())
    assert behind == {"getitem_1": "getitem_1"}
    graph.get_submodule("quantizers.getitem_1").set_grid(torch.tensor(0.05), torch.tensor(128))
    assert graph(IMAGES).shape == (2, 4)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.linear(y)


def test_the_projections_of_attention_are_quantized():
    images = torch.randn(2, 4, 3, 3)
    model = Attention().eval()
    expected = model(images)
    graph, _ = placed(model, images=images)
    torch.testing.assert_close(graph(images), expected)
    assert quantizable(graph) == {"attention.in_proj", "attention.out_proj", "linear"}
    calls = [node for node in graph.graph.nodes if node.target in quantizable(graph)]
    assert [type(layer_of(node.args[0])) for node in calls] == [FakeQuantize] * 3
    assert graph.attention.in_proj.weight is model.attention.in_proj_weight


def test_operators_without_integer_kernel_are_not_quantizable():
    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    class Same(nn.Conv2d):
        pass

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.same, self.up = Own(3, 3, 1), Same(3, 4, 1), nn.ConvTranspose2d(4, 4, 2)

        def forward(self, x):
            return self.up(self.same(self.own(x)))

    graph = capture(Model(), IMAGES)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["own", "same", "up"]
    assert quantizable(graph) == {"own", "same"}


class Padded(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3)
        self.options = options

    def forward(self, x):
        return self.second(F.pad(self.first(x), (1, 1, 1, 1), **self.options)).mean((2, 3))


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({}, True),
        ({"value": 0.0}, True),
        ({"mode": "reflect"}, True),
        ({"mode": "replicate"}, True),
        ({"value": 9.0}, False),
        ({"mode": "constant", "value": -1.0}, False),
    ],
)
def test_padding_with_grid_values_shares_the_quantizer(options, moves):
    _, behind = placed(Padded(**options))
    assert behind["pad"] == ("first" if moves else "pad")


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.drop(F.relu(self.first(x.mean((2, 3))))))


def test_dropout_is_skipped_and_never_quantized():
    graph, behind = placed(Dropped())
    assert list(behind) == ["mean", "relu"]
    nodes = {node.name: node for node in graph.graph.nodes}
    assert is_nothing_in_eval(nodes["drop"])
    assert not is_nothing_in_eval(nodes["relu"])


def test_source_of_follows_moved_values():
    nodes = {node.name: node for node in capture(Shuffle(), IMAGES).graph.nodes}
    assert source_of(nodes["view_1"]) is nodes["cat"]
    assert source_of(nodes["getitem"]) is nodes["conv"]
    assert source_of(nodes["cat"]) is nodes["cat"]


class Mixed(nn.Module):
    """Additions that a runtime can compute in integers, and others."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x):
        y = self.a(x) * self.scale + 1
        return self.c(self.b(x).sigmoid() * y)


def test_only_sums_of_quantized_tensors_are_integer_operators():
    _, behind = placed(Mixed())
    # `mul` (by a parameter), `add` (of a number) and `sigmoid` are computed in float; `c` reads what they give
    assert list(behind) == ["x", "a", "b", "mul_1", "c"]


def test_a_reserved_attribute_name_raises():
    class Taken(OnlyLogits):
        def __init__(self):
            super().__init__()
            self.quantizers = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.quantizers(x)

    with pytest.raises(InputError, match="named 'quantizers'"):
        placed(Taken())


class Always(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


class Plus(nn.Identity):
    def forward(self, x):
        return x + 1


class Casts(nn.Module):
    """Nodes named `to` and `to_`."""

    def __init__(self):
        super().__init__()
        self.to_, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(self.to_((x > 0).to(torch.float32)))


def test_quantizers_are_not_named_like_attributes_of_a_module():
    graph = capture(Casts().eval(), IMAGES)
    expected = ["quantizers.to__", "quantizers.to_", "quantizers.conv"]
    assert activation_quantizers(graph, ["to_", "conv"], "onnxruntime") == set(expected)
    assert insert_activation_quantizers(graph, ["to_", "conv"], Grid.unsigned(8), "onnxruntime") == expected
    fresh = rebuild(Casts().eval(), structure(graph))
    assert [str(node.target) for node in fresh.graph.nodes] == [str(node.target) for node in graph.graph.nodes]


@pytest.mark.parametrize(
    ("module", "handed_on"),
    [(nn.Dropout(), True), (Always(), False), (Plus(), False)],
    ids=["Dropout", "drops", "adds"],
)
def test_modules_without_effect_in_eval_mode_are_recognized(module, handed_on):
    graph = capture(nn.Sequential(module).eval(), IMAGES).graph
    (node,) = (node for node in graph.nodes if node.op not in ("placeholder", "output"))
    assert is_nothing_in_eval(node) == handed_on


def test_an_identity_is_not_a_node():
    graph = capture(nn.Sequential(nn.Identity()), IMAGES).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "output"]


class WithSiLU(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.first, self.act, self.second = nn.Conv2d(3, 4, 3), act, nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.second(self.act(self.first(x)))


@pytest.mark.parametrize("act", [nn.SiLU(), nn.SiLU(inplace=True), F.silu])
def test_silu_is_quantized_as_two_operators_for_onnxruntime_only(act):
    model, images = WithSiLU(act).eval(), torch.randn(2, 3, 8, 8)
    graph = capture(model, images)
    assert torch.allclose(graph(images), model(images), atol=1e-6)
    inside = {"quantizers.sigmoid", "quantizers.mul"}
    assert activation_quantizers(graph, ["first", "second"], "onnxruntime") >= inside
    assert "quantizers.sigmoid" not in activation_quantizers(graph, ["first", "second"], "openvino")
