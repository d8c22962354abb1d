"""Products of two activations with a large rounding error: they stay in float.

An attention head that attends to one position needs a grid up to 1. In another head of the same product, each of L
positions has a weight of about 1 / L, which may be less than a step of that grid.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tersor.core.target import Target
from tersor.data.network_inputs import NetworkInput
from tersor.graph.capture import layer_of, values_into
from tersor.graph.eval_mode import first_images
from tersor.graph.forward_call import in_order
from tersor.quantization.activation_products import matrix_products
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.qdq_placement import activation_quantizers, source_of, without_quantizers
from tersor.quantization.quantizers import Quantizers

_IMAGES = 16
_LARGEST = 0.01
"""Largest squared error of a product relative to its square, as the mean over matrices (heads)."""

_TINY = torch.finfo(torch.float32).tiny


def without_inaccurate_products(quantizers: Quantizers, data: Iterable[Any], target: Target) -> Quantizers:
    """Keep products with a large rounding error on a few images in float; return the remaining quantizers.

    Args:
        quantizers: quantizers of the network, all enabled.
        data: batches of images, which can be read again.
        target: runtime and processor that the network is compressed for.
    """
    if not quantizers.products:
        return quantizers
    always = activation_quantizers(without_quantizers(quantizers.graph), quantizers.layers, target.runtime)
    errors: defaultdict[str, list[float]] = defaultdict(list)
    for images in first_images(data, _IMAGES, next(quantizers.graph.parameters()).device):
        for name, error in product_errors(quantizers, images, always).items():
            errors[name].append(error)
    kept = tuple(name for name in quantizers.products if sum(errors[name]) <= _LARGEST * len(errors[name]))
    if kept == quantizers.products:
        return quantizers
    remaining = replace(quantizers, products=kept)
    remaining.enable({*quantizers.layers, *kept}, target)
    return remaining


@torch.inference_mode()
def product_errors(quantizers: Quantizers, images: NetworkInput, always: Container[str] = ()) -> dict[str, float]:
    """The relative squared error of each product, as the mean over its matrices.

    Args:
        quantizers: quantizers of the network, all enabled.
        images: (N, C, H, W).
        always: quantizers whose rounding does not count, since layers need them too.
    """
    products = _Products(quantizers, always)
    products.run(*in_order(quantizers.graph.graph, images))
    return products.errors


class _Products(fx.Interpreter):
    """Computes each product a second time from operands that are not rounded."""

    def __init__(self, quantizers: Quantizers, always: Container[str]) -> None:
        super().__init__(quantizers.graph)
        found = matrix_products(quantizers.graph)
        self.names = {found[name]: name for name in quantizers.products}
        self.sources: set[fx.Node] = set()
        self.behind: set[fx.Node] = set()
        for node in self.names:
            for operand in values_into(node):
                self._trace(operand, always)
        self.exact: dict[fx.Node, Any] = {}
        self.errors: dict[str, float] = {}

    def _trace(self, node: fx.Node, always: Container[str]) -> None:
        """Follow an operand back to the quantizer that rounds it first."""
        path: list[fx.Node] = []
        while isinstance(layer_of(node), FakeQuantize) or source_of(node) is not node:
            if isinstance(layer_of(node), FakeQuantize) and not node.kwargs:
                if str(node.target) not in always:
                    self.sources.add(node)
                    self.behind.update(path)
                return
            path.append(node)
            node = values_into(node)[0]

    def run_node(self, n: fx.Node) -> Any:
        """As in `fx.Interpreter`."""
        result = super().run_node(n)
        if n in self.sources or (n in self.behind and isinstance(layer_of(n), FakeQuantize)):
            self.exact[n] = self._exactly(values_into(n)[0])
        elif n in self.behind or n in self.names:
            rounded, self.env = self.env, {**self.env, **{each: self._exactly(each) for each in n.all_input_nodes}}
            exact = super().run_node(n)
            self.env = rounded
            if n in self.behind:
                self.exact[n] = exact
            else:
                error, energy = (each.square().sum((-2, -1)) for each in (result - exact, exact))
                self.errors[self.names[n]] = float((error / energy.clamp(min=_TINY)).mean())
        return result

    def _exactly(self, node: fx.Node) -> Any:
        return self.exact[node] if node in self.exact else self.env[node]
