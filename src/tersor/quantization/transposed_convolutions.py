"""Transposed convolutions written as convolutions, for which the runtimes have integer kernels.

Shi et al., "Is the Deconvolution Layer the Same as a Convolutional Layer?", 2016: a transposed convolution with kernel
size k and stride s is a convolution with s times the output channels, whose outputs are interleaved. In one dimension:

    y[c, s m + r] = sum_j x[m - j] w[c, s j + r]        r = 0, ..., s - 1: one channel of the convolution for each

The convolution has a kernel of K = ceil(k / s), padded with zeros, and thus s K / k times as many multiplications in
each dimension: none more for k = s = 2 or for k = 4, s = 2, and 1.8 times as many in total for k = 3, s = 2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tersor.graph.aten import shape_of, with_shape
from tersor.graph.capture import layer_of, values_into
from tersor.graph.layer_selection import Convolution, TransposedConvolution
from tersor.graph.matrix_products import OperatorAdder
from tersor.graph.plain_modules import is_plain

WRITTEN = "written_as_convolutions"
"""Key of the `meta` of a graph: the names of the layers that were rewritten."""

_KINDS = {nn.ConvTranspose1d: nn.Conv1d, nn.ConvTranspose2d: nn.Conv2d, nn.ConvTranspose3d: nn.Conv3d}
_MOST_MULTIPLICATIONS = 2.0
"""A layer that would have more than so many times the multiplications stays as it is."""
_aten = torch.ops.aten


def transposed_convolutions(graph: fx.GraphModule) -> dict[str, TransposedConvolution]:
    """The transposed convolutions of a captured network that can be written as convolutions, by name."""
    owners = Counter(id(p) for module in graph.modules() for p in module.parameters(recurse=False))
    owners.update(id(_attribute(graph, node)) for node in graph.graph.nodes if node.op == "get_attr")
    found: dict[str, TransposedConvolution] = {}
    for node in graph.graph.nodes:
        module = layer_of(node)
        if type(module) in _KINDS and isinstance(module, TransposedConvolution) and is_plain(module):
            alone = all(owners[id(each)] == 1 for each in module.parameters())
            sizes = shape_of(values_into(node)[0])[2:] + shape_of(node)[2:]
            if alone and all(isinstance(size, int) for size in sizes) and _is_suitable(module):
                found[str(node.target)] = module
    return found


def write_as_convolutions(graph: fx.GraphModule, names: Iterable[str]) -> None:
    """Replace these layers, which `transposed_convolutions` returned, by convolutions, in place.

    Each keeps its name. Its new weight is (s^n C_out, C_in, K, ...), for a stride of s in n dimensions.

    Raises:
        KeyError: one of them is not such a layer.
    """
    known = transposed_convolutions(graph)
    layers = {name: known[name] for name in names}
    for name, layer in layers.items():
        graph.set_submodule(name, _convolution(layer))
    for node in [node for node in graph.graph.nodes if node.op == "call_module" and node.target in layers]:
        result = _interleaved(node, layers[str(node.target)])
        node.replace_all_uses_with(result)
        graph.graph.erase_node(node)
        outputs: dict[str, str] = graph.meta["layers"]
        outputs.update({path: result.name for path, name in outputs.items() if name == node.name})
    if layers:
        graph.meta[WRITTEN] = [*layers]
        graph.recompile()


def _attribute(graph: fx.GraphModule, node: fx.Node) -> Any:
    owner, _, name = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(owner), name)


def _is_suitable(layer: TransposedConvolution) -> bool:
    before, after = _margins(layer)
    more = math.prod(
        s * kernel / k for s, kernel, k in zip(layer.stride, _kernel(layer), layer.kernel_size, strict=True)
    )
    return (
        layer.groups == 1 and set(layer.dilation) == {1} and min(*before, *after) >= 0 and more <= _MOST_MULTIPLICATIONS
    )


def _kernel(layer: TransposedConvolution) -> tuple[int, ...]:
    """The kernel size of the convolution."""
    return tuple(-(-k // s) for k, s in zip(layer.kernel_size, layer.stride, strict=True))


def _margins(layer: TransposedConvolution) -> tuple[list[int], list[int]]:
    """The padding that the convolution needs before and after the values, in each dimension."""
    settings = zip(layer.kernel_size, layer.stride, _padding(layer), layer.output_padding, _kernel(layer), strict=True)
    before, after = list[int](), list[int]()
    for k, s, padding, more, kernel in settings:
        before.append(kernel - 1 - padding // s)
        after.append((k + more - padding - 1) // s)
    return before, after


def _padding(layer: TransposedConvolution) -> Sequence[int]:
    assert not isinstance(layer.padding, str)
    return layer.padding


@torch.no_grad()
def _convolution(layer: TransposedConvolution) -> Convolution:
    """The convolution that replaces a layer; it pads equally on both sides."""
    phases, kernel = math.prod(layer.stride), _kernel(layer)
    made = _KINDS[type(layer)](
        layer.in_channels,
        phases * layer.out_channels,
        kernel,
        padding=tuple(map(max, *_margins(layer))),
        bias=layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    made.weight.copy_(_weight(layer.weight, layer.stride, kernel)).requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None:
        assert made.bias is not None
        made.bias.copy_(layer.bias.repeat_interleave(phases)).requires_grad_(layer.bias.requires_grad)
    return made.train(layer.training)


def _weight(weight: Tensor, stride: Sequence[int], kernel: Sequence[int]) -> Tensor:
    """(C_in, C_out, k, ...) -> (s^n C_out, C_in, K, ...)."""
    missing = [s * size - k for s, size, k in zip(stride, kernel, weight.shape[2:], strict=True)]
    padded = F.pad(weight.transpose(0, 1), [width for each in reversed(missing) for width in (0, each)])
    n = len(stride)
    split = padded.reshape(*padded.shape[:2], *(size for pair in zip(kernel, stride, strict=True) for size in pair))
    kernels, phases = [2 + 2 * place for place in range(n)], [3 + 2 * place for place in range(n)]
    return split.flip(kernels).permute(0, *phases, 1, *kernels).flatten(0, n)


def _interleaved(node: fx.Node, layer: TransposedConvolution) -> fx.Node:
    """Nodes for the convolution and its interleaved outputs, before the `node` of the transposed one."""
    stride, n, add = layer.stride, len(layer.stride), OperatorAdder(node)
    value, (batch, channels, *wanted) = values_into(node)[0], shape_of(node)
    padding = list(map(max, *_margins(layer)))
    sizes = [
        size + 2 * pad - kernel + 1
        for size, pad, kernel in zip(shape_of(value)[2:], padding, _kernel(layer), strict=True)
    ]
    with node.graph.inserting_before(node):
        result = node.graph.call_module(str(node.target), (value,))
    result.meta = with_shape(node.meta, (batch, math.prod(stride) * channels, *sizes))
    if math.prod(stride) > 1:
        shape = (batch, channels, *stride, *sizes)
        result = add(shape, _aten.unflatten.int, result, 1, [channels, *stride])
        order = [
            0,
            1,
            *(place for pair in zip(range(2 + n, 2 + 2 * n), range(2, 2 + n), strict=True) for place in pair),
        ]
        shape = tuple(shape[place] for place in order)
        result = add(shape, _aten.permute.default, result, order)
        for dim in range(2, 2 + n):
            shape = (*shape[:dim], shape[dim] * shape[dim + 1], *shape[dim + 2 :])
            result = add(shape, _aten.flatten.using_ints, result, dim, dim + 1)
    return _cropped(add, result, _starts(layer, padding), wanted)


def _starts(layer: TransposedConvolution, padding: Sequence[int]) -> list[int]:
    """Where the output of the transposed convolution begins in the interleaved values, in each dimension."""
    settings = zip(layer.stride, _padding(layer), _kernel(layer), padding, strict=True)
    return [first - s * (kernel - 1 - pad) for s, first, kernel, pad in settings]


def _cropped(add: OperatorAdder, value: fx.Node, starts: Sequence[int], wanted: Sequence[Any]) -> fx.Node:
    for dim, (start, size) in enumerate(zip(starts, wanted, strict=True), 2):
        before = shape_of(value)
        if before[dim] != size:
            shape = (*before[:dim], size, *before[dim + 1 :])
            value = add(shape, _aten.slice.Tensor, value, dim, start, start + size)
    return value
