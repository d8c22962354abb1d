"""Rare variants of an operator are captured as the common one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tersor.graph.aten import operator_name
from tersor.graph.capture import capture

IMAGES = torch.rand(3, 3, 4, 4)


class Tokens(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 1), function
        self.weight = nn.Parameter(torch.rand(5, 4))

    def forward(self, images):
        return self.function(self.conv(images).flatten(2), self.weight)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda tokens, _: tokens.mT, ["transpose"]),
        (lambda tokens, weight: tokens.mean(2) @ weight.T.abs(), ["transpose", "matmul"]),
        (lambda tokens, weight: torch.mm(tokens.mean(2), weight.abs().T), ["transpose", "matmul"]),
    ],
    ids=["mT", "T", "mm"],
)
def test_a_rare_operator_is_captured_as_a_common_one(function, expected):
    network = Tokens(function).eval()
    graph = capture(network, IMAGES)
    names = [operator_name(node) for node in graph.graph.nodes]
    assert [each for each in names if each in {"transpose", "matmul", "mm", "mT", "numpy_T", "t"}] == expected
    assert torch.allclose(graph(IMAGES), network(IMAGES), atol=1e-6)


def test_a_view_as_another_dtype_is_kept():
    network = Tokens(lambda tokens, _: torch.where(tokens.view(torch.int32) < 0, 0.1 * tokens, tokens)).eval()
    graph = capture(network, IMAGES)
    assert [node.target for node in graph.graph.nodes if operator_name(node) == "view"] == [torch.ops.aten.view.dtype]
    assert torch.equal(graph(IMAGES), network(IMAGES))


def silu_of_a_part(tokens, _):
    nn.functional.silu(tokens[:, :2], inplace=True)
    return tokens


def silu_of_a_view(tokens, _):
    return nn.functional.silu(tokens.transpose(1, 2), inplace=True) + tokens.transpose(1, 2)


def silu_of_a_sum(tokens, _):
    return nn.functional.silu(tokens.add_(1), inplace=True)


def silu_of_dropout(tokens, _):
    return nn.functional.silu(nn.functional.dropout(tokens, 0.5, training=False), inplace=True) + tokens


def change_of_a_copy(tokens, _):
    tokens.to(torch.float32, copy=True).mul_(2)
    return tokens


def change_of_the_same_tensor(tokens, _):
    tokens.to(torch.float32).mul_(2)
    return tokens


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (silu_of_a_part, True),
        (silu_of_a_view, True),
        (silu_of_a_sum, False),
        (silu_of_dropout, False),
        (change_of_a_copy, False),
        (change_of_the_same_tensor, False),
    ],
)
def test_an_in_place_change_is_kept_if_the_memory_is_shared(function, kept):
    network = Tokens(function).eval()
    graph = capture(network, IMAGES)
    assert torch.allclose(graph(IMAGES), network(IMAGES), atol=1e-6)
    assert ("silu_" in [operator_name(node) for node in graph.graph.nodes]) == kept
