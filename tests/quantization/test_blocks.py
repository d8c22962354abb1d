from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor.core.target import Target
from tersor.graph.capture import capture
from tersor.methods.adaround import AdaRound
from tersor.methods.brecq import BRECQ
from tersor.methods.ptq import PTQ
from tersor.models import build
from tersor.quantization.blocks import Block, between, blocks, layer_blocks
from tersor.quantization.quantizer_options import Precision
from tersor.quantization.quantizers import insert_quantizers
from tersor.training.context import AttachContext

IMAGES = torch.randn(2, 3, 6, 6)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.conv3 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.linear = nn.Linear(4, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x * 2)))
        x = F.relu(x + self.conv3(F.relu(self.conv2(x))))
        return self.linear(x.mean((2, 3)))


def test_blocks_begin_and_end_at_single_values():
    found = blocks(capture(Small().eval(), IMAGES))
    assert found == [
        Block("x", "relu", ("conv1",)),
        Block("relu", "mean", ("conv2", "conv3")),
        Block("mean", "linear_1", ("linear",)),
    ]


def test_a_block_is_split_into_layers_with_their_fused_operators():
    graph = capture(Small().eval(), IMAGES)
    first, second, _ = blocks(graph)
    assert layer_blocks(graph, first) == [Block("mul", "relu", ("conv1",))]
    assert layer_blocks(graph, second) == [
        Block("relu", "relu_1", ("conv2",)),
        Block("relu_1", "conv3", ("conv3",)),
    ]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    ("name", "layers"), [("resnet20", [1, *[2] * 9, 1]), ("shufflenet_v2_x0_5", [1, *[5, 3, 3, 3], 5, *[3] * 7, 5])]
)
def test_running_the_blocks_in_sequence_equals_the_network(name, layers, quantized):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    graph = capture(build(name, 10).eval(), images)
    if quantized:
        insert_quantizers(graph, Precision(), exclude=(), target=Target(), method="ptq")
    found = blocks(graph)
    assert [len(block.layers) for block in found][: len(layers)] == layers
    # a quantizer is in the same block as its input
    assert all(block.end.startswith("quantizers") for block in found[:-1]) is quantized
    values = images
    for block in found:
        values = between(graph, block.begin, block.end)(values)
    assert torch.equal(values, graph(images))
    assert [name for block in found for name in block.layers] == [
        str(node.target)
        for node in graph.graph.nodes
        if node.op == "call_module" and isinstance(graph.get_submodule(node.target), nn.Conv2d | nn.Linear)
    ]


class Token(nn.Module):
    """Reads the batch size of the images between two layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.token, self.linear = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 5)

    def forward(self, x):
        n = x.shape[0]
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.linear(torch.cat([self.token.expand(n, -1, -1), x], 1))


def test_a_part_reads_the_batch_size_from_its_input():
    graph = capture(Token().eval(), IMAGES)
    part = between(graph, "conv", "linear_1")
    assert [node.op for node in part.graph.nodes].count("placeholder") == 1
    for count in (1, 3):
        images = torch.randn(count, 3, 6, 6)
        assert torch.equal(part(graph.conv(images)), graph(images))


def test_an_empty_part_returns_its_input_and_modules_can_be_replaced():
    graph = capture(Small().eval(), IMAGES)
    values = torch.randn(2, 4, 6, 6)
    assert torch.equal(between(graph, "relu", "relu")(values), values)
    instead = between(graph, "relu", "conv3", {"conv2": nn.Identity()})
    assert torch.equal(instead(values), graph.conv3(F.relu(values)))
    assert torch.equal(between(graph, "relu", "conv3")(values), graph.conv3(F.relu(graph.conv2(values))))


class Heads(nn.Module):
    """Several outputs: the layers after the last single value form one block."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        return {"maps": self.conv2(x), "values": self.linear(x.mean((2, 3))), "best": x.flatten(1).argmax(1)}


def test_the_last_block_ends_at_the_outputs():
    graph = capture(Heads().eval(), IMAGES)
    first, last = blocks(graph)
    assert first == Block("x", "relu", ("conv1",))
    assert last == Block("relu", "output", ("conv2", "linear"))
    assert [block.layers for block in layer_blocks(graph, last)] == [("conv2",), ("linear",)]
    expected = graph(IMAGES)
    found = between(graph, "relu", "output")(between(graph, "x", "relu")(IMAGES))
    for one, other in zip(found, expected.values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", [AdaRound, BRECQ])
def test_learned_rounding_improves_a_network_with_several_outputs(method):
    images = 10 * torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    exact, low = Heads().eval(), {"bits": 3, "first_last_bits": 3}
    uncorrected = {"weight_range": "mse", "bias_correction": False, "variance_correction": False}
    nearest, learned = (
        each.attach(Heads().eval(), AttachContext(data=[images]))
        for each in (PTQ(**low, **uncorrected), method(**low, iterations=100))
    )
    errors = []
    for attachment in (nearest, learned):
        attachment.begin()
        with torch.no_grad():
            found, expected = attachment.model.eval()(images), exact(images)
        errors.append([float((found[key] - expected[key]).square().mean()) for key in ("maps", "values")])
    assert all(learned.quantizers.is_on_grid(name) for name in ("conv1", "conv2", "linear"))
    assert all(after < before for before, after in zip(*errors, strict=True)), errors
