"""Operators that OpenVINO computes incorrectly are rewritten, or stay in float and are listed."""

from importlib.metadata import version

import pytest
import torch
from torch import nn

import tersor
from tersor.core.errors import InputError
from tersor.core.target import Target
from tersor.deploy.onnx import export
from tersor.evaluation.session import open_session
from tersor.evaluation.verification import verify
from tersor.graph.aten import operator_name
from tersor.methods.ptq import PTQ
from tersor.quantization import runtime_defects
from tersor.quantization.fake_quantize import quantizers_disabled
from tersor.training.context import AttachContext


class Tokens(nn.Module):
    """A patch embedding and a class token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.norm(x).mean(1))


class Maximum(nn.Module):
    """A fully connected layer after a maximum."""

    REDUCED = {  # noqa: RUF012
        "amax": lambda x: x.amax((2, 3)),
        "amin": lambda x: x.amin((2, 3)),
        "max": lambda x: x.flatten(2).max(2).values,
        "adaptive": lambda x: nn.functional.adaptive_max_pool2d(x, 1).flatten(1),
        "concatenated": lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1),
        "activated": lambda x: x.amax((2, 3)).relu(),
        "pooled": lambda x: nn.functional.max_pool2d(x, 8).flatten(1),
        "added": lambda x: x.amax((2, 3)) + x.mean((2, 3)),
    }

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Linear(32 if kind == "concatenated" else 16, 5)
        self.reduced = self.REDUCED[kind]

    def forward(self, images):
        return self.head(self.reduced(nn.functional.gelu(self.first(images))))


IMAGES = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def quantized(network, runtime):
    torch.manual_seed(0)
    context = AttachContext(data=[IMAGES], target=Target(runtime=runtime))
    attached = PTQ().attach(network.eval(), context)
    attached.begin()
    return attached.model.eval()


def in_float(network):
    return {each.name: each.reason for each in tersor.integer_coverage(network, IMAGES[:2]).operators}


@pytest.mark.parametrize("kind", Maximum.REDUCED)
def test_for_openvino_a_layer_after_a_maximum_stays_in_float(kind, tmp_path):
    model = quantized(Maximum(kind), "openvino")
    reason = "OpenVINO computes a quantized maximum over positions or channels incorrectly"
    assert in_float(model) == ({} if kind in {"pooled", "added"} else {"head": reason})
    assert not in_float(quantized(Maximum(kind), "onnxruntime"))
    if kind != "adaptive":  # the exporter of torch 2.10 lacks its operator
        file = export(model, IMAGES, tmp_path / "model.onnx")
        verify(open_session(file, "openvino", precision="float32"), model, IMAGES)


class Filled(nn.Module):
    """Zero padding of one dimension of values that are quantized with a zero point."""

    PADDED = {  # noqa: RUF012
        "tokens": lambda x: nn.functional.pad(x.flatten(2).transpose(1, 2), (0, 0, 1, 0)).transpose(1, 2).unsqueeze(3),
        "channels": lambda x: nn.functional.pad(x[:, 1:], (0, 0, 0, 0, 1, 0)),
        "columns": lambda x: nn.functional.pad(x, (1, 0, 0, 0)),
        "rows": lambda x: nn.ZeroPad2d((0, 0, 0, 2))(x),
        "cut": lambda x: nn.functional.pad(x, (0, -1)),
        "tokens of ones": lambda x: (
            nn.functional.pad(x.flatten(2).transpose(1, 2), (0, 0, 1, 0), value=1.0).transpose(1, 2).unsqueeze(3)
        ),
        "rows of ones": lambda x: nn.ConstantPad2d((0, 0, 0, 2), 1.0)(x),
    }

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3, 2), nn.Conv2d(16, 16, 1), nn.Linear(16, 5)
        self.padded = self.PADDED[kind]

    def forward(self, images):
        return self.head(nn.functional.gelu(self.second(self.padded(self.first(images)))).mean((2, 3)))


@pytest.mark.parametrize("kind", Filled.PADDED)
def test_padding_of_one_dimension_is_rewritten_as_padding_of_two(kind):
    network = Filled(kind)
    model = quantized(network, "openvino")
    assert not in_float(model)
    with quantizers_disabled(model):
        assert torch.allclose(model(IMAGES), network(IMAGES), atol=1e-5)
    widths = [list(node.args[1]) for node in model.graph.nodes if operator_name(node) == "pad"]
    assert [sum(width != 0 for width in each) for each in widths] == [2]


@pytest.mark.skipif(Target().cpu == "amx", reason="not measured on processors with AMX")
@pytest.mark.parametrize("kind", Filled.PADDED)
def test_padding_of_one_dimension_is_computed_correctly_in_openvino(kind, tmp_path):
    if kind.endswith("of ones") and Target().cpu != "vnni":
        pytest.skip("measured on a processor with AVX-512 and VNNI")
    model = quantized(Filled(kind), "openvino")
    file = export(model, IMAGES, tmp_path / "model.onnx")
    verify(open_session(file, "openvino", precision="float32"), model, IMAGES)


class AveragedTokens(nn.Module):
    """Averages or sums 8-bit values of three dimensions."""

    REDUCED = {  # noqa: RUF012
        "mean": lambda x: x.mean(1),
        "kept dimension": lambda x: x.mean(-2, keepdim=True).flatten(1),
        "sum": lambda x: x.sum(1),
        "both": lambda x: x.mean((1, 2)).reshape(-1, 1),
        "last": lambda x: x.transpose(1, 2).mean(2),
        "pooling": lambda x: nn.AdaptiveAvgPool1d(1)(x.transpose(1, 2)).flatten(1),
        "pooling function": lambda x: nn.functional.adaptive_avg_pool1d(x.transpose(1, 2), 1).flatten(1),
    }

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
        self.reduced = self.REDUCED[kind]

    def forward(self, images):
        return self.reduced(self.second(self.first(images).flatten(2).transpose(1, 2)))


@pytest.mark.parametrize("kind", AveragedTokens.REDUCED)
def test_averages_of_three_dimensions_are_written_in_four(kind):
    network = AveragedTokens(kind).eval()
    model = quantized(network, "openvino")
    assert not in_float(model)
    with quantizers_disabled(model):
        assert torch.allclose(model(IMAGES), network(IMAGES), atol=1e-5)
    for graph, widened in ((model, True), (quantized(AveragedTokens(kind), "onnxruntime"), False)):
        assert ("unsqueeze" in [operator_name(node) for node in graph.graph.nodes]) == widened


@pytest.mark.skipif(Target().cpu != "vnni", reason="measured on a processor with AVX-512 and VNNI")
@pytest.mark.parametrize("kind", AveragedTokens.REDUCED)
def test_averages_of_three_dimensions_are_right_in_openvino(kind, tmp_path):
    model = quantized(AveragedTokens(kind), "openvino")
    file = export(model, IMAGES, tmp_path / "model.onnx")
    verify(open_session(file, "openvino", precision="float32"), model, IMAGES)


class Averaged(nn.Module):
    """Average pooling of values that are quantized with a zero point."""

    def __init__(self, pool):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.pool = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 5, 1), pool

    def forward(self, images):
        return self.second(self.pool(nn.functional.leaky_relu(self.first(images), 0.1))).mean((2, 3))


AVERAGES = {
    "module": (nn.AvgPool2d(3, 1, 1), [[1, 1, 1, 1]]),
    "function": (lambda x: nn.functional.avg_pool2d(x, (3, 5), 2, (1, 2)), [[2, 2, 1, 1]]),
    "padding not counted": (nn.AvgPool2d(3, 1, 1, count_include_pad=False), []),
    "no padding": (nn.AvgPool2d(2), []),
    "after a ReLU": (nn.Sequential(nn.ReLU(), nn.AvgPool2d(3, 1, 1)), []),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_padding_of_average_pooling_is_rewritten_as_a_separate_padding(kind):
    pool, expected = AVERAGES[kind]
    network = Averaged(pool).eval()
    model = quantized(network, "openvino")
    with quantizers_disabled(model):
        assert torch.allclose(model(IMAGES), network(IMAGES), atol=1e-5)
    assert [list(node.args[1]) for node in model.graph.nodes if operator_name(node) == "pad"] == expected


@pytest.mark.skipif(Target().cpu == "amx", reason="not measured on processors with AMX")
@pytest.mark.parametrize("kind", AVERAGES)
def test_padding_of_average_pooling_is_computed_correctly_in_openvino(kind, tmp_path):
    model = quantized(Averaged(AVERAGES[kind][0]), "openvino")
    file = export(model, IMAGES, tmp_path / "model.onnx")
    verify(open_session(file, "openvino", precision="float32"), model, IMAGES)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()])
def test_padding_after_a_relu_is_not_rewritten(activation):
    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.activation = nn.Conv2d(3, 8, 3), nn.Conv2d(16, 8, 3), activation

        def forward(self, images):
            return self.second(nn.functional.pad(self.activation(self.first(images))[:, :, ::2], [0, 0, 0, 0, 4, 4]))

    graph = quantized(Shortcut(), "openvino")
    assert [list(node.args[1]) for node in graph.graph.nodes if operator_name(node) == "pad"] == [[0, 0, 0, 0, 4, 4]]


def test_padding_of_a_vector_is_not_rewritten():
    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(768, 15), nn.Linear(16, 5)

        def forward(self, images):
            return self.head(nn.functional.pad(self.first(images.flatten(1)), (1, 0)))

    graph = quantized(Vector(), "openvino")
    assert [list(node.args[1]) for node in graph.graph.nodes if operator_name(node) == "pad"] == [[1, 0]]


class Padded(nn.Module):
    """Padding whose size depends on the image, as in Swin; here it is 0 on all sides."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        x = self.first(x).relu()
        return self.second(nn.functional.pad(x, (0, -x.shape[3] % 7, 0, -x.shape[2] % 7))).mean((2, 3))


def test_padding_of_size_0_is_removed():
    graph = quantized(Padded(), "openvino")
    assert not [node for node in graph.graph.nodes if operator_name(node) == "pad"]
    assert not in_float(graph)


@pytest.mark.skipif(version("openvino") < "2026", reason="OpenVINO has this defect since 2026.0")
@pytest.mark.parametrize(
    ("rule", "network"),
    [
        ("rewrite_expansions", Tokens()),
        ("after_maxima", Maximum("amax")),
        pytest.param(
            "pad_two_dimensions",
            Filled("columns"),
            marks=[pytest.mark.slow, pytest.mark.skipif(Target().cpu == "amx", reason="not measured on AMX")],
        ),
        pytest.param(
            "average_in_four_dimensions",
            AveragedTokens("mean"),
            marks=[pytest.mark.slow, pytest.mark.skipif(Target().cpu != "vnni", reason="measured on VNNI")],
        ),
    ],
    ids=["expanded constant", "maximum", "padding", "average"],
)
def test_openvino_still_has_the_defect(rule, network, tmp_path, monkeypatch):
    """If this fails, OpenVINO computes the network correctly, and the rule can be removed."""
    monkeypatch.setattr(runtime_defects, rule, lambda _: set())
    model = quantized(network, "openvino")
    file = export(model, IMAGES, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="differ from torch's"):
        verify(open_session(file, "openvino"), model, IMAGES)
