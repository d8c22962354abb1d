from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tersor.graph.batchnorm_behind import norm_behind, norms_behind
from tersor.graph.capture import capture

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Tokens(nn.Module):
    """(N, 8, 8) -> (N, 8, 8): as many features as tokens, so that the two cannot be distinguished by shape."""

    def __init__(self, norm):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), norm

    def forward(self, images):
        return self.norm(self.linear(images[:, 0]))


def vectors(norm, features=5):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, features), norm)


def maps(norm):
    return nn.Sequential(nn.Conv2d(3, 5, 1), norm)


class Shifted(nn.BatchNorm2d):
    def forward(self, values):
        return super().forward(values) + 1


class Doubled(nn.BatchNorm2d):
    """It has an operator before the normalization, whose input is then not the output of a layer."""

    def forward(self, values):
        return super().forward(2 * values)


FOUND = {
    "maps": lambda: maps(nn.BatchNorm2d(5)),
    "maps, of several processes": lambda: maps(nn.SyncBatchNorm(5)),
    "not affine": lambda: maps(nn.BatchNorm2d(5, affine=False)),
    "with an operator behind it": lambda: maps(Shifted(5)),
    "vectors": lambda: vectors(nn.BatchNorm1d(5)),
    "vectors, of several processes": lambda: vectors(nn.SyncBatchNorm(5)),
}
NOT_FOUND = {
    "tokens": lambda: Tokens(nn.BatchNorm1d(8)),
    "tokens, of several processes": lambda: Tokens(nn.SyncBatchNorm(8)),
    "on another value": lambda: maps(Doubled(5)),
    "no statistics": lambda: maps(nn.BatchNorm2d(5, track_running_stats=False)),
    "groups": lambda: maps(nn.GroupNorm(1, 5)),
}


def nodes(graph):
    return [
        node
        for node in graph.graph.nodes
        if node.op == "call_module" and isinstance(graph.get_submodule(node.target), nn.Conv2d | nn.Linear)
    ]


@pytest.mark.parametrize("kind", FOUND | NOT_FOUND)
def test_norm_behind_finds_only_norms_over_the_channels(kind):
    model = (FOUND | NOT_FOUND)[kind]().eval()
    (node,) = nodes(capture(model, IMAGES))
    assert (norm_behind(node) is not None) == (kind in FOUND)
    assert list(norms_behind(model, IMAGES)) == ([node.target] if kind in FOUND else [])


def test_norm_behind_works_on_a_copy_of_the_graph():
    graph = capture(vectors(nn.BatchNorm1d(5)), IMAGES)
    assert graph.training
    copied = copy.deepcopy(graph.graph)
    copied.owning_module = graph
    (node,) = [node for node in copied.nodes if node.target == "1"]
    assert norm_behind(node).node.target == "2"
    (node,) = nodes(copy.deepcopy(graph))
    assert norm_behind(node).node.target == "2"


def test_norm_behind_needs_a_single_norm_per_layer_call():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.one, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            return self.one(a) + self.other(a) + self.one(b)

    first, second = nodes(capture(Two().eval(), IMAGES))
    assert norm_behind(first) is None
    assert norm_behind(second).node.target == "one"
