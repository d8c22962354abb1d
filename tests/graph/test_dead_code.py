from __future__ import annotations

import torch
from torch import nn

from tersor.graph.aten import operator_name
from tersor.graph.capture import capture

IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Writes(nn.Module):
    """Writes into a view of its output, and into a copy that is not used."""

    def __init__(self):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 4, 1), nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = self.conv(x)
        x[:, 1:3].mul_(2)
        unread = self.scale.clone()
        unread[0].zero_()
        return x.mean((2, 3))


def test_writes_that_affect_the_output_are_kept_and_others_are_removed():
    model = Writes().eval()
    graph = capture(model, IMAGES)
    assert [operator_name(node) for node in graph.graph.nodes if operator_name(node)] == ["slice", "mul_", "mean"]
    assert torch.equal(graph(IMAGES), model(IMAGES))
    assert [name for name, _ in graph.named_parameters()] == ["conv.weight", "conv.bias"]
