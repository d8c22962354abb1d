from __future__ import annotations

import pytest
import torch
from torch import nn

import tersor
from tersor.core.errors import InputError
from tersor.graph.capture import capture

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Regions(nn.Module):
    """Its convolution runs inside a context manager."""

    def __init__(self, context):
        super().__init__()
        self.context = context
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        with self.context():
            x = self.norm(self.conv(x)).relu()
            with torch.no_grad():
                x = x + 1
        return self.head(x.mean((2, 3)))


def without_autocast():
    return torch.autocast("cpu", enabled=False)


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, without_autocast])
def test_layers_inside_a_region_are_layers_of_the_graph(context):
    torch.manual_seed(0)
    model = Regions(context).eval()
    graph = capture(model, IMAGES)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["conv", "norm", "head"]
    assert graph.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(graph(IMAGES), model(IMAGES))
    assert torch.allclose(graph.train()(IMAGES), model.train()(IMAGES)), "BatchNorm inside normalizes by the batch"
    quantized = tersor.quantize(model.eval(), [IMAGES])
    assert tersor.integer_coverage(quantized, IMAGES).share == 1


def test_parameters_inside_a_no_grad_region_get_no_gradients():
    graph = capture(Regions(torch.no_grad).eval(), IMAGES)
    graph(IMAGES).sum().backward()
    assert {name for name, each in graph.named_parameters() if each.grad is not None} == {"head.weight", "head.bias"}


class Within(nn.Module):
    """Nested regions, one of which also returns a value that is not a tensor."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        with torch.no_grad():
            with without_autocast():
                gate = self.gate(x).sigmoid()
            gate, height = gate * 2, x.shape[2]
        return self.head(self.conv(x) * gate) / height


def test_nested_regions_are_inlined():
    model = Within().eval()
    graph = capture(model, IMAGES)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["gate", "conv", "head"]
    assert torch.equal(graph(IMAGES), model(IMAGES))
    graph(IMAGES).sum().backward()
    assert {name.partition(".")[0] for name, each in graph.named_parameters() if each.grad is not None} == {
        "conv",
        "head",
    }
    assert not [name for name, _ in graph.named_modules() if "region" in name], "the regions themselves are gone"


def test_a_region_that_turns_autocast_on_raises():
    class Low(Regions):
        def forward(self, x):
            with self.context():
                x = self.conv(x)
            return self.head(x.float().mean((2, 3)))

    with pytest.raises(InputError, match=r"turns autocast on.*Remove torch.autocast"):
        capture(Low(autocast).eval(), IMAGES)
