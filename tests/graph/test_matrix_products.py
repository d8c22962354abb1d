"""Attention and einsum as matrix products: the same outputs, in eval and after saving."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from tersor.graph.aten import operator_name, shape_of
from tersor.graph.capture import capture
from tersor.graph.matrix_products import write_as_matrix_products

IMAGES = torch.rand(2, 3, 4, 6)


class Applied(nn.Module):
    """A function of three projections (N, heads, 24, 2) of the images."""

    def __init__(self, function):
        super().__init__()
        self.function, self.projections = function, nn.Conv2d(3, 18, 1)

    def forward(self, images):
        return self.function(*self.projections(images).flatten(2).mT.unflatten(-1, (3, 3, 2)).transpose(1, 3).unbind(2))


class Shapes(fx.Interpreter):
    """Checks the recorded output size of every node, except for sizes that depend on the batch."""

    def run_node(self, n):
        output = super().run_node(n)
        if isinstance(output, torch.Tensor) and n.op not in {"get_attr", "output"}:
            pairs = zip(shape_of(n), output.shape, strict=True)
            assert all(size == actual for size, actual in pairs if isinstance(size, int)), n
        return output


BIAS = torch.randn(24, 24)
WRITTEN = {
    "attention": (F.scaled_dot_product_attention, 2),
    "attention with a scale": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), 2),
    "attention with an added mask": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BIAS), 2),
    "attention over fewer keys": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, 4:], v[:, :, 4:]),
        2,
    ),
    "scores by einsum": (lambda q, k, _: torch.einsum("bhid,bhjd->bhij", q, k), 1),
    "heads last in the output": (lambda q, k, v: torch.einsum("bhij,bhjd->bihd", q @ k.mT, v), 2),
    "letters in another order": (lambda q, k, _: torch.einsum("bhid,bhjd->hjbi", q, k), 1),
}
KEPT = {
    "mask of booleans": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, q.mean(-1, keepdim=True) > k.mean()),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "two dimensions contracted": lambda q, k, _: torch.einsum("bhid,bgid->bhg", q, k),
    "no dimension contracted": lambda q, k, _: torch.einsum("bhid,bhid->bhid", q, k),
    "sum over a dimension": lambda q, k, _: torch.einsum("bhid,bhjd->bhi", q, k),
    "one operand": lambda q, *_: torch.einsum("bhid->bdih", q),
}


def counted(graph):
    names = [operator_name(node) for node in graph.graph.nodes]
    return names.count("matmul"), names.count("einsum") + names.count("scaled_dot_product_attention")


@pytest.mark.parametrize("kind", WRITTEN)
def test_attention_and_einsum_are_rewritten_as_matrix_products_with_the_same_result(kind):
    function, products = WRITTEN[kind]
    network = Applied(function).eval()
    graph = capture(network, IMAGES)
    write_as_matrix_products(graph)
    assert counted(graph) == (products, 0)
    for images in (IMAGES, torch.rand(3, 3, 4, 6)):
        torch.testing.assert_close(Shapes(graph).run(images), network(images))


@pytest.mark.parametrize("kind", KEPT)
def test_operators_that_cannot_be_written_as_matrix_products_are_kept(kind):
    graph = capture(Applied(KEPT[kind]).eval(), IMAGES)
    before = graph.code
    write_as_matrix_products(graph)
    assert graph.code == before
    assert counted(graph) == (0, 1)


def test_outputs_of_modules_are_found_after_the_rewrite():
    network = nn.Sequential(Applied(F.scaled_dot_product_attention), nn.Flatten(), nn.Linear(144, 2)).eval()
    graph = capture(network, IMAGES)
    write_as_matrix_products(graph)
    assert graph.meta["layers"]["0"] in {node.name for node in graph.graph.nodes}
