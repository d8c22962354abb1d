"""Constants expanded to the batch size are rewritten, so that OpenVINO does not lose a bias."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tersor
from tersor.core.target import Target
from tersor.deploy.onnx import export
from tersor.evaluation.session import open_session
from tersor.evaluation.verification import verify
from tersor.graph.aten import operator_name
from tersor.methods.ptq import PTQ
from tersor.quantization.fake_quantize import quantizers_disabled
from tersor.training.context import AttachContext

IMAGES = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
EXPANSIONS = {"expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave"}


def grid():
    line = torch.linspace(-1, 1, 4)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"))[None]


class Tokens(nn.Module):
    """A patch embedding, and a constant that the subclasses use in different ways."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 4, 4)
        nn.init.normal_(self.patches.bias, 1)  # the bias that OpenVINO would lose
        self.token, self.tokens = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(4, 16))
        self.norm, self.linear, self.table = nn.LayerNorm(16), nn.Linear(16, 16), nn.Embedding(16, 16)
        self.keys, self.values, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.second = nn.Conv2d(18, 16, 3)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.use(x)).mean(1))

    def attend(self, queries, x):
        return (queries @ self.keys(x).transpose(1, 2) / 4).softmax(-1) @ self.values(x)


class ClassToken(Tokens):
    def use(self, x):
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1)


class NormalizedToken(Tokens):
    def use(self, x):
        return torch.cat([self.norm(self.linear(self.token)).expand(len(x), -1, -1), x], 1)


class StackedToken(Tokens):
    def use(self, x):
        return torch.stack([self.token[0].expand(len(x), -1), x.mean(1)], 1)


class WrittenToken(Tokens):
    def use(self, x):
        all_tokens = x.new_zeros(len(x), 17, 16)
        all_tokens[:, :1] = self.token
        all_tokens[:, 1:] = x
        return all_tokens


class Queries(Tokens):
    def use(self, x):
        return self.attend(self.linear(self.tokens[None].repeat(len(x), 1, 1)), x)


class QueriesBeforeTheBatch(Tokens):
    def use(self, x):
        return self.attend(self.tokens[:, None].repeat(1, len(x), 1).transpose(0, 1), x)


class QueriesOfWindows(Tokens):
    def use(self, x):
        windows = x.reshape(-1, 4, 16)
        return self.attend(self.tokens[None].repeat(len(windows), 1, 1), windows).reshape(-1, 16, 16)


class QueriesInOneDimension(Tokens):
    def use(self, x):
        return self.attend(self.tokens.repeat(len(x), 1).reshape(len(x), 4, 16), x)


class QueriesOfWindowsInOneDimension(Tokens):
    def use(self, x):
        windows = x.reshape(-1, 4, 16)
        queries = self.tokens.tile(len(windows), 1).reshape(-1, 4, 16)
        return self.attend(queries, windows).reshape(-1, 16, 16)


class Positions(Tokens):
    def use(self, x):
        return x + self.table(torch.arange(16)[None].expand(len(x), -1))


class KeptTokens(Tokens):
    def use(self, x):
        return x.masked_fill(~torch.ones(len(x), 16, 1, dtype=torch.bool), 0)


class Scaled(Tokens):
    def use(self, x):
        return x * self.linear(x.mean(1, keepdim=True)).sigmoid().expand_as(x)


class Normalized(Tokens):
    def use(self, x):
        return self.attend(F.normalize(self.linear(x), dim=-1), F.normalize(x, dim=-1))


class MeanOfAll(Tokens):
    def use(self, x):
        return torch.cat([x, x.mean(1, keepdim=True).expand(-1, 16, -1)], 1)


class Pairs(Tokens):
    def use(self, x):
        return torch.cat([x[:, :, None].expand(-1, -1, 16, -1), x[:, None].expand(-1, 16, -1, -1)], 1).flatten(1, 2)


class KeptMeans(Tokens):
    def use(self, x):
        return torch.where((x.mean(1, keepdim=True) > 1).expand(-1, 16, -1), x, -x)


class Concatenated(Tokens):
    """Features, and a constant created in the forward method."""

    MADE = {  # noqa: RUF012
        "zeros": lambda x: torch.zeros(len(x), 2, *x.shape[2:]),
        "new_ones": lambda x: x.new_ones(len(x), 2, *x.shape[2:]),
        "repeat": lambda x: grid().repeat(len(x), 1, 1, 1),
        "tile": lambda x: torch.tile(grid(), (len(x), 1, 1, 1)),
        "repeat_interleave": lambda x: grid().repeat_interleave(len(x), 0),
        "broadcast_to": lambda x: torch.broadcast_to(grid(), (len(x), 2, 4, 4)),
        "expand_as": lambda x: grid().expand_as(x[:, :2]),
        "mean": lambda x: x[:, :2].mean((2, 3), keepdim=True).expand(-1, -1, 4, 4),
        "of more dimensions": lambda x: torch.linspace(-1, 1, x.shape[3]).expand(len(x), 2, *x.shape[2:]),
    }

    def __init__(self, kind):
        super().__init__()
        self.made = self.MADE[kind]

    def forward(self, images):
        x = self.patches(images)
        return self.head(self.second(torch.cat([x, self.made(x)], 1)).mean((2, 3)))


NETWORKS = {
    **{kind.__name__: kind for kind in Tokens.__subclasses__() if kind is not Concatenated},
    **{kind: lambda kind=kind: Concatenated(kind) for kind in Concatenated.MADE},
}


def quantized(network, runtime):
    attached = PTQ().attach(network.eval(), AttachContext(data=[IMAGES], target=Target(runtime=runtime)))
    attached.begin()
    return attached.model.eval()


def expansions(graph):
    """The operators that expand features of the images, or a constant to a size that the graph computes."""
    return [
        name
        for node in graph.graph.nodes
        if (name := operator_name(node)) in EXPANSIONS and (node.all_input_nodes[1:] or _has_images(node))
    ]


def _has_images(node):
    return node.op == "placeholder" or any(map(_has_images, node.all_input_nodes))


@pytest.mark.parametrize("kind", NETWORKS)
def test_for_openvino_expansions_are_rewritten(kind):
    network = NETWORKS[kind]()
    model = quantized(network, "openvino")
    assert not expansions(model)
    assert [each for each in tersor.integer_coverage(model, IMAGES[:2]).operators if each.name] == []
    with quantizers_disabled(model):
        for count in (1, 3):
            assert torch.allclose(model(IMAGES[:count]), network(IMAGES[:count]), atol=1e-5)


@pytest.mark.skipif(Target().cpu != "vnni", reason="measured on a processor with AVX-512 and VNNI")
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_file_for_openvino_agrees_with_the_network(kind, tmp_path):
    model = quantized(NETWORKS[kind](), "openvino")
    file = export(model, IMAGES, tmp_path / "model.onnx")
    verify(open_session(file, "openvino", precision="float32"), model, IMAGES)


def test_the_zeros_are_computed_once_per_dtype():
    class Both(Tokens):
        def use(self, x):
            positions = self.table(torch.arange(16)[None].expand(len(x), -1))
            return torch.cat([self.token.expand(len(x), -1, -1), self.token.expand(len(x), -1, -1), x + positions], 1)

    products = [node for node in quantized(Both(), "openvino").graph.nodes if operator_name(node) == "mul"]
    assert [node.args[1] for node in products] == [0, 0]


def test_a_constant_independent_of_the_batch_size_is_not_changed():
    class Broadcast(Tokens):
        def use(self, x):
            return x + self.token.expand(1, 16, -1) + torch.zeros(16)

    names = [operator_name(node) for node in quantized(Broadcast(), "openvino").graph.nodes]
    assert "expand" in names
    assert "mul" not in names


def test_for_onnxruntime_the_expanded_constant_is_kept():
    assert expansions(quantized(ClassToken(), "onnxruntime")) == ["expand"]
