from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import tersor
from tersor.graph.capture import capture

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Standardized(nn.Conv2d):
    def forward(self, x):
        centered = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, centered / centered.std(), self.bias, padding=1)


class Twice(nn.Module):
    """A layer with a computed weight that is called twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 1), Standardized(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.conv(self.conv(self.stem(x)).relu()).mean((2, 3)))


def test_a_computed_weight_that_is_used_twice_is_one_parameter():
    torch.manual_seed(0)
    model = Twice().eval()
    graph = capture(model, IMAGES)
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert called[0] == "stem"
    assert called[1] == called[2]
    assert torch.allclose(graph(IMAGES), model(IMAGES), atol=1e-6)
    assert tersor.integer_coverage(tersor.quantize(model, [IMAGES]), IMAGES).share == 1


class ZeroedInPlace(nn.Module):
    """As in Swin V2: a part of the bias is set to zero after it is copied."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 6)

    def forward(self, x):
        bias = self.linear.bias.clone()
        bias[2:4].zero_()
        return F.linear(x.mean((2, 3)), self.linear.weight, bias)


def test_a_bias_changed_in_place_is_captured_with_the_changed_values():
    model = ZeroedInPlace().eval()
    graph = capture(model, IMAGES)
    layer = next(each for each in graph.modules() if isinstance(each, nn.Linear))
    assert layer.weight is model.linear.weight
    assert layer.bias[2:4].eq(0).all()
    assert torch.equal(layer.bias[:2], model.linear.bias[:2])
    assert torch.allclose(graph(IMAGES), model(IMAGES))
    assert not model.linear.bias[2:4].eq(0).any()


class Shifted(nn.Module):
    """Its bias depends on the images."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 6)

    def forward(self, x):
        x = x.mean((2, 3))
        return F.linear(x, self.linear.weight, self.linear.bias * x.mean())


def test_a_bias_that_depends_on_the_images_is_added_after_the_layer():
    model = Shifted().eval()
    graph = capture(model, IMAGES)
    assert torch.allclose(graph(IMAGES), model(IMAGES), atol=1e-6)
    assert graph.state_dict().keys() == model.state_dict().keys()
    layer = next(each for each in graph.modules() if isinstance(each, nn.Linear))
    assert layer.weight is model.linear.weight
    assert layer.bias is None
