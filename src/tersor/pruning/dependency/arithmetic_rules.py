"""Coupling rules for operators that compute: elementwise, reductions, matrix products, attention."""

from __future__ import annotations

from typing import Any

from tersor.pruning.dependency.propagation import Call, ChannelPropagation, Rule, frozen
from tersor.pruning.dependency.shape_recording import Shape
from tersor.pruning.dependency.shape_rules import broadcast
from tersor.pruning.dependency.union_find import Ids, TrackedShape


def elementwise(propagation: ChannelPropagation, call: Call) -> Any:
    """Operators whose output element depends on one element of each input, after broadcasting."""
    output, tensors = tuple(call.output), call.tensors
    if len(tensors) == 1 and tensors[0].shape == output:
        return tensors[0]
    ids = list(broadcast(propagation, call, tensors))
    if len(ids) != len(output):
        return propagation.freeze(call)
    return TrackedShape(output, tuple(ids))


def reduction(propagation: ChannelPropagation, call: Call) -> Any:
    """sum, norm, mean, max along dimensions. Terms of a sum can be removed; a mean or maximum would change."""
    tensor = call.args[0]
    dimensions = call.argument(2 if call.name == "linalg_vector_norm" else 1, "dim")
    if dimensions is None or dimensions == []:
        return propagation.freeze(call, f"{call.node.name} ({call.name}) reduces over all of them")
    along = {axis % len(tensor.shape) for axis in ([dimensions] if isinstance(dimensions, int) else dimensions)}
    for axis in along:
        if call.name not in _SUMS:
            propagation.sets.freeze(tensor.ids[axis], f"{call.node.name} ({call.name}) reduces over them")
    keepdim = tuple(None if axis in along else ids for axis, ids in enumerate(tensor.ids))
    squeezed = tuple(ids for axis, ids in enumerate(tensor.ids) if axis not in along)

    def tracked(output: Any) -> Any:
        if isinstance(output, Shape):
            return TrackedShape(tuple(output), keepdim if len(output) == len(keepdim) else squeezed)
        return tuple(map(tracked, output))

    return tracked(call.output)


def along_dimension(propagation: ChannelPropagation, call: Call) -> Any:
    """softmax, cumsum: elements along one dimension depend on each other."""
    tensor = call.tensors[0]
    dimension = call.argument(1, "dim") if call.module is None else getattr(call.module, "dim", None)
    if not isinstance(dimension, int):
        return propagation.freeze(call)
    propagation.sets.freeze(tensor.ids[dimension], f"{call.node.name} ({call.name}) combines them")
    return tensor


def layer_norm(propagation: ChannelPropagation, call: Call) -> Any:
    """layer_norm over the last dimension, with weight and bias that the graph reads directly."""
    tensor, sizes = call.args[:2]
    ids = tensor.ids[-1]
    if len(sizes) > 1:
        return propagation.freeze(call)
    for factor in call.tensors[1:]:
        ids = propagation.sets.couple(
            ids, factor.ids[-1], f"{call.node.name} combines them with a tensor of fixed size"
        )
    propagation.track_argument(call, "args.1.0", sizes[0], ids)
    propagation.cross_channel.add(call.node)
    return TrackedShape(tensor.shape, (*tensor.ids[:-1], ids))


def matmul(propagation: ChannelPropagation, call: Call) -> Any:
    """matmul, bmm: (..., m, k) x (..., k, n)."""
    first, second = call.args[0], call.args[1]
    if not (isinstance(first, TrackedShape) and isinstance(second, TrackedShape)):
        return propagation.freeze(call)
    if min(len(first.shape), len(second.shape)) < 2:
        return propagation.freeze(call)
    propagation.sets.couple(
        first.ids[-1], second.ids[-2], f"{call.node.name} combines them with a tensor of fixed size"
    )
    batches = [TrackedShape(each.shape[:-2], each.ids[:-2]) for each in (first, second)]
    batch = list(broadcast(propagation, call, batches)) if any(each.shape for each in batches) else []
    return TrackedShape(tuple(call.output), (*batch, first.ids[-2], second.ids[-1]))


def einsum(propagation: ChannelPropagation, call: Call) -> Any:
    """Dimensions with the same letter are coupled."""
    if not isinstance(call.args[0], str) or "." in call.args[0]:
        return propagation.freeze(call)
    inputs, _, output = call.args[0].replace(" ", "").partition("->")
    letters: dict[str, Ids | None] = {}
    reason = f"{call.node.name} combines them with a tensor of fixed size"
    for names, tensor in zip(inputs.split(","), call.tensors, strict=True):
        for letter, ids in zip(names, tensor.ids, strict=True):
            letters[letter] = propagation.sets.couple(letters[letter], ids, reason) if letter in letters else ids
    return TrackedShape(tuple(call.output), tuple(letters[letter] for letter in output))


def attention(propagation: ChannelPropagation, call: Call) -> Any:
    """scaled_dot_product_attention: the heads of all three are coupled, and the width of query and key."""
    query, key, value = (call.argument(position, name) for position, name in enumerate(("query", "key", "value")))
    batches = [TrackedShape(each.shape[:-2], each.ids[:-2]) for each in (query, key, value)]
    batch = list(broadcast(propagation, call, batches))
    reason = f"{call.node.name} combines them with a tensor of fixed size"
    width = propagation.sets.couple(query.ids[-1], key.ids[-1], reason)
    if call.kwargs.get("scale") is None:
        propagation.track_argument(call, "scale", query.shape[-1], width)
    for each in (key, value):
        propagation.sets.freeze(each.ids[-2], f"{call.node.name} computes attention over them")
    mask = call.argument(3, "attn_mask")
    if mask is not None:
        scores = TrackedShape((*query.shape[:-1], key.shape[-2]), (*batch, query.ids[-2], None))
        list(broadcast(propagation, call, [scores, mask]))
    return TrackedShape(tuple(call.output), (*batch, query.ids[-2], value.ids[-1]))


def linear(propagation: ChannelPropagation, call: Call) -> Any:
    """linear with weights that the graph computes or reads directly."""
    tensor, weight, bias = call.args[0], call.argument(1, "weight"), call.argument(2, "bias")
    propagation.sets.couple(tensor.ids[-1], weight.ids[1], f"{call.node.name} reads a tensor of fixed size")
    out = weight.ids[0]
    if bias is not None:
        out = propagation.sets.couple(out, bias.ids[0], f"{call.node.name} adds a tensor of fixed size")
    return TrackedShape(tuple(call.output), (*tensor.ids[:-1], out))


def pooling(propagation: ChannelPropagation, call: Call) -> Any:
    """Pooling and interpolation: per channel; pixels are frozen."""
    tensor = call.args[0]
    for ids in tensor.ids[2:]:
        propagation.sets.freeze(ids, f"{call.node.name} pools them")

    def tracked(output: Any) -> Any:
        if isinstance(output, Shape):
            return TrackedShape(tuple(output), (*tensor.ids[:2], *[None] * (len(output) - 2)))
        return tuple(map(tracked, output))

    return tracked(call.output)


def instance_norm(propagation: ChannelPropagation, call: Call) -> Any:
    """instance_norm without weights and statistics: per channel; pixels are frozen."""
    tensor, *others = call.tensors
    if others:
        return propagation.freeze(call)
    for ids in tensor.ids[2:]:
        propagation.sets.freeze(ids, f"{call.node.name} normalizes over them")
    return TrackedShape(tuple(call.output), (*tensor.ids[:2], *[None] * (len(tensor.shape) - 2)))


def recurrent(propagation: ChannelPropagation, call: Call) -> Any:
    """lstm, gru: the features that go in can be removed, those inside cannot."""
    tensor, _, weights = call.args[:3]
    read = tensor.ids[-1]
    inputs = 2 if call.argument(7, "bidirectional") else 1
    step = len(weights) // (call.argument(4, "num_layers") * inputs)
    reason = f"{call.node.name} ({call.name}) reads them"
    for each in weights[: inputs * step : step]:
        read = propagation.sets.couple(read, each.ids[1], reason)
    for each in (*tensor.ids[:-1], *(weight.ids[0] for weight in weights)):
        propagation.sets.freeze(each, reason)
    for number, each in enumerate(weights):
        if (len(each.shape) > 1 and number % step != 0) or number >= inputs * step:
            propagation.sets.freeze(each.ids[-1], reason)
    return frozen(call.output)


_SUMS = {"sum", "linalg_vector_norm"}
_UNARY = [
    *("relu", "relu_", "relu6", "relu6_", "gelu", "silu", "silu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "hardswish"),
    *("hardswish_", "hardsigmoid", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "elu", "elu_", "celu", "selu"),
    *("softplus", "mish", "mish_", "exp", "log", "log2", "sqrt", "rsqrt", "pow", "neg", "abs", "clamp", "clamp_"),
    *("clamp_min", "clamp_max", "dropout", "feature_dropout", "alpha_dropout", "contiguous", "clone", "detach"),
    *("alias", "to", "_to_copy", "type_as", "square", "erf", "sin", "cos", "sign", "round", "floor", "ceil"),
    *("nan_to_num", "reciprocal", "log1p", "expm1", "log_sigmoid", "prelu", "zeros_like", "ones_like"),
]
_BROADCASTING = [
    *("add", "sub", "mul", "div", "rsub", "add_", "sub_", "mul_", "div_", "where", "maximum", "minimum", "addcmul"),
    *("addcdiv", "lerp", "masked_fill", "eq", "ne", "lt", "gt", "le", "ge", "logical_not", "logical_and", "multiply"),
    *("divide", "subtract"),
]
_REDUCTIONS = ("sum", "linalg_vector_norm", "mean", "amax", "amin", "max", "min", "var", "std", "argmax", "logsumexp")
_POOLS = [
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d"),
    *("adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d"),
    *("upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest3d", "upsample_trilinear3d", "upsample_linear1d"),
]

RULES: dict[str, Rule] = {
    **dict.fromkeys([*_UNARY, *_BROADCASTING], elementwise),
    **dict.fromkeys(_REDUCTIONS, reduction),
    **dict.fromkeys(("softmax", "log_softmax", "cumsum"), along_dimension),
    "layer_norm": layer_norm,
    "instance_norm": instance_norm,
    **dict.fromkeys(("matmul", "bmm"), matmul),
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    "linear": linear,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), recurrent),
    **dict.fromkeys(_POOLS, pooling),
}
