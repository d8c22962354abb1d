"""What OpenVINO would compute incorrectly in integers: rewritten, or left in float.

OpenVINO, since 2026.0, loses the bias of 8-bit layers if the graph expands a value, such as a class token or the
queries of a decoder. The accuracy of a ViT fell from 61 to 47 %, and by as much in the 8-bit files of two other tools.
`quantization/expansions.py` rewrites these operators.

OpenVINO 2026.4 pads 8-bit values with a wrong integer unless two or more dimensions are padded: the result is wrong, or
the file cannot be read. So one more dimension is padded, and cut off again. Zeros after a ReLU are right, because they
are stored as 0. Average pooling with padding has the same defect.

OpenVINO 2026.4 returns zeros for all images but the first if 8-bit values of three dimensions, such as tokens
(N, T, C), are averaged or summed over the second dimension, or over the third behind a Conv1d. With a fourth dimension
the result is right.

OpenVINO 2026.4 also computes a maximum over positions or channels (ReduceMax, not MaxPool) incorrectly if its output is
quantized: the attention of CBAM, for example. So the layers that read such a maximum stay in float.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from tersor.core.target import Runtime
from tersor.graph.aten import arguments, operator_name, shape_of
from tersor.graph.capture import layer_of, values_into
from tersor.graph.layer_selection import Layer
from tersor.graph.matrix_products import OperatorAdder
from tersor.graph.plain_modules import is_plain
from tersor.quantization.expansions import rewrite_expansions
from tersor.quantization.qdq_placement import CONCATENATIONS, quantizable, source_of

_aten = torch.ops.aten
_MAXIMA = {"amax", "amin", "max", "min", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"}
_RECTIFIERS = {"relu", "relu_", "relu6", "relu6_"}


def rewrite_for_openvino(graph: fx.GraphModule) -> None:
    """Rewrite what OpenVINO would compute incorrectly, in place."""
    rewrite_expansions(graph)
    pad_before_averages(graph)
    pad_two_dimensions(graph)
    average_in_four_dimensions(graph)


def pad_before_averages(graph: fx.GraphModule) -> None:
    """Replace average pooling that counts its zero padding by padding and a pooling without it, in place."""
    for node in list(graph.graph.nodes):
        module = layer_of(node)
        if isinstance(module, nn.AvgPool2d) and is_plain(module):
            names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
            given = {name: getattr(module, name) for name in names}
        elif operator_name(node) == "avg_pool2d":
            given = arguments(node)
        else:
            continue
        kernel, stride, padding = (_pair(given[name]) for name in ("kernel_size", "stride", "padding"))
        values = values_into(node)[0]
        if not any(padding) or not given["count_include_pad"] or given["ceil_mode"] or _is_rectified(source_of(values)):
            continue
        add, (*before, rows, columns) = OperatorAdder(node), shape_of(values)
        wide = (*before, rows + 2 * padding[0], columns + 2 * padding[1])
        padded = add(wide, _aten.pad.default, values, [padding[1], padding[1], padding[0], padding[0]])
        rest = [kernel, stride or kernel, [0, 0], False, True, given["divisor_override"]]
        node.replace_all_uses_with(add(shape_of(node), _aten.avg_pool2d.default, padded, *rest))
        graph.graph.erase_node(node)
    graph.recompile()


def _pair(size: int | Sequence[int]) -> list[int]:
    return [size, size] if isinstance(size, int) else [*size, *size][:2]


def pad_two_dimensions(graph: fx.GraphModule) -> None:
    """Replace padding of one dimension with a constant by padding of two dimensions and a slice, in place."""
    for node in list(graph.graph.nodes):
        widths, constant = _constant_padding(node)
        padded = {place // 2 for place, width in enumerate(widths) if width}
        if len(padded) != 1 or (not constant and _is_rectified(source_of(values_into(node)[0]))):
            continue
        other, shape, values = 1 if padded == {0} else 0, list(shape_of(node)), values_into(node)
        dim = len(shape) - 1 - other
        if not dim:  # the batch is not padded
            continue
        widths += [0] * (2 * other + 2 - len(widths))
        widths[2 * other + 1] = 1
        add, rest = OperatorAdder(node), ("constant", constant) if constant else ()
        wide = add((*shape[:dim], shape[dim] + 1, *shape[dim + 1 :]), _aten.pad.default, values[0], widths, *rest)
        node.replace_all_uses_with(add(tuple(shape), _aten.slice.Tensor, wide, dim, 0, -1))
        graph.graph.erase_node(node)
    graph.recompile()


def _is_rectified(node: fx.Node) -> bool:
    """Whether `node` is a ReLU, whose grid stores zero as 0."""
    return operator_name(node) in _RECTIFIERS or isinstance(layer_of(node), nn.ReLU | nn.ReLU6)


def _constant_padding(node: fx.Node) -> tuple[list[int], float]:
    """The widths of padding, from the last dimension on, before and after each, and the constant; else no widths."""
    module = layer_of(node)
    if isinstance(module, nn.modules.padding._ConstantPadNd):  # pyright: ignore[reportPrivateUsage]
        return list(module.padding), module.value
    if operator_name(node) != "pad" or arguments(node)["mode"] != "constant":
        return [], 0.0
    given = arguments(node)
    return list(given["pad"]), given["value"] or 0.0


def average_in_four_dimensions(graph: fx.GraphModule) -> None:
    """Replace means and sums of (N, T, C) over T or C by those of (N, 1, T, C), in place."""
    for node in list(graph.graph.nodes):
        target, dims, kept = _reduction(node)
        if not dims or 0 in dims or len(shape_of(values_into(node)[0])) != 3:
            continue
        add, value, shape = OperatorAdder(node), values_into(node)[0], shape_of(node)
        batch, *others = shape_of(value)
        wide = add((batch, 1, *others), _aten.unsqueeze.default, value, 1)
        total = add((batch, 1, *shape[1:]), target, wide, [dim + 1 for dim in sorted(dims)], kept)
        node.replace_all_uses_with(add(shape, _aten.squeeze.dim, total, 1))
        graph.graph.erase_node(node)
    graph.recompile()


def _reduction(node: fx.Node) -> tuple[Any, set[int], bool]:
    """Operator, dimensions of a value with three dimensions, and whether they are kept; without dimensions for others.

    Adaptive pooling to one position is a mean. The exporter writes it with an index of every image, which OpenVINO
    computes incorrectly for 8-bit values.
    """
    module = layer_of(node)
    if isinstance(module, nn.AdaptiveAvgPool1d) and is_plain(module):
        size: Any = module.output_size
    elif operator_name(node) == "adaptive_avg_pool1d":
        size = arguments(node)["output_size"]
    elif operator_name(node) in {"mean", "sum"}:
        given = arguments(node)
        return node.target, {dim % 3 for dim in given.get("dim") or ()}, given.get("keepdim", False)
    else:
        return None, set(), False
    return _aten.mean.dim, {2} if size in (1, [1], (1,)) else set(), True


def correct_in_integers(graph: fx.GraphModule, runtime: Runtime) -> set[str]:
    """Names of the layers of a captured network that `runtime` computes in integers, and correctly."""
    known = quantizable(graph)
    return known - after_maxima(graph) if runtime == "openvino" else known


def after_maxima(graph: fx.GraphModule) -> set[str]:
    """Names of the layers that read a maximum or minimum over positions or channels."""
    maxima: set[fx.Node] = set()
    found: set[str] = set()
    for node in graph.graph.nodes:
        values, layer = values_into(node), layer_of(node)
        reads = not maxima.isdisjoint(values)
        if isinstance(layer, Layer):
            found |= {str(node.target)} if reads else set()
        elif _is_maximum(node) or (reads and (len(values) == 1 or operator_name(node) in CONCATENATIONS)):
            maxima.add(node)
    return found


def _is_maximum(node: fx.Node) -> bool:
    module = layer_of(node)
    if isinstance(module, nn.modules.pooling._AdaptiveMaxPoolNd):  # pyright: ignore[reportPrivateUsage]
        return True
    return operator_name(node) in _MAXIMA and len(values_into(node)) == 1
