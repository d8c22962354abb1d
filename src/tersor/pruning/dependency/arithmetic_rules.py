"""Rules for operators that compute: element by element, sums along dimensions, products of matrices, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tersor.pruning.dependency.propagation import Call, ChannelPropagation, Rule
from tersor.pruning.dependency.shape_recording import Shape
from tersor.pruning.dependency.shape_rules import matched
from tersor.pruning.dependency.union_find import Ids, Labelled


def elementwise(walk: ChannelPropagation, call: Call) -> Any:
    """One value from one value each, or from those of several tensors that are broadcast."""
    gives = tuple(call.gives)
    tensors = call.tensors
    if len(tensors) == 1 and tensors[0].shape == gives:
        return tensors[0]
    atoms = list(matched(walk, call, tensors))
    if len(atoms) != len(gives):
        return walk.keep(call)
    return Labelled(gives, tuple(atoms))


def reduced(walk: ChannelPropagation, call: Call) -> Any:
    """sum, mean, max along dimensions. Of a sum any term may go; a mean or a maximum would become another."""
    given = call.args[0]
    dimensions = call.argument(1, "dim")
    if dimensions is None:
        return walk.keep(call, f"{call.node.name} ({call.name}) takes all of them together")
    along = {axis % len(given.shape) for axis in ([dimensions] if isinstance(dimensions, int) else dimensions)}
    for axis in along:
        if call.name != "sum":
            walk.atoms.keep(given.atoms[axis], f"{call.node.name} ({call.name}) goes across them")
    left = [None if axis in along else ids for axis, ids in enumerate(given.atoms)]
    short = [ids for axis, ids in enumerate(given.atoms) if axis not in along]

    def kept(gives: Any) -> Any:
        if isinstance(gives, Shape):
            return Labelled(tuple(gives), tuple(left if len(gives) == len(left) else short))
        return type(gives)(*map(kept, gives)) if hasattr(gives, "_fields") else tuple(map(kept, gives))

    return kept(call.gives)


def across(walk: ChannelPropagation, call: Call) -> Any:
    """softmax, normalize: values along a dimension depend on each other."""
    given = call.tensors[0]
    place = {"normalize": 2, "cumsum": 1}.get(call.name, 1)
    dimension = call.argument(place, "dim", 1 if call.name == "normalize" else None)
    if call.module is not None:
        dimension = getattr(call.module, "dim", None)
    if not isinstance(dimension, int):
        return walk.keep(call)
    if call.name != "normalize":  # a length has as many terms as there are
        walk.atoms.keep(given.atoms[dimension], f"{call.node.name} ({call.name}) goes across them")
    return given


def layer_norm(walk: ChannelPropagation, call: Call) -> Any:
    """F.layer_norm: over the last dimension only, with weight and bias of the same channels."""
    given, sizes = call.args[0], call.args[1] if len(call.args) > 1 else call.kwargs["normalized_shape"]
    ids = given.atoms[-1]
    if len(sizes) > 1:
        return walk.keep(call)
    for factor in call.tensors[1:]:
        ids = walk.atoms.match(ids, factor.atoms[-1], f"{call.node.name} meets them with what cannot shrink")
    path = "args.1" if len(call.args) > 1 else "kwargs.normalized_shape"
    walk.literal(call, f"{path}.0", sizes[0], ids)
    walk.across.add(call.node)
    return Labelled(given.shape, (*given.atoms[:-1], ids))


def matrix_product(walk: ChannelPropagation, call: Call) -> Any:
    """matmul, bmm: (..., m, k) x (..., k, n)."""
    first, second = call.args[0], call.args[1]
    if not (isinstance(first, Labelled) and isinstance(second, Labelled)):
        return walk.keep(call)
    if min(len(first.shape), len(second.shape)) < 2:
        return walk.keep(call)
    walk.atoms.match(first.atoms[-1], second.atoms[-2], f"{call.node.name} meets them with what cannot shrink")
    outer = [Labelled(each.shape[:-2], each.atoms[:-2]) for each in (first, second)]
    ahead = list(matched(walk, call, outer)) if any(each.shape for each in outer) else []
    return Labelled(tuple(call.gives), (*ahead, first.atoms[-2], second.atoms[-1]))


def einsum(walk: ChannelPropagation, call: Call) -> Any:
    """The same letter, the same dimension."""
    if not isinstance(call.args[0], str) or "." in call.args[0]:
        return walk.keep(call)
    read, _, made = call.args[0].replace(" ", "").partition("->")
    letters: dict[str, Ids | None] = {}
    for names, tensor in zip(read.split(","), call.tensors, strict=True):
        for letter, ids in zip(names, tensor.atoms, strict=True):
            why = f"{call.node.name} meets them with what cannot shrink"
            letters[letter] = walk.atoms.match(letters[letter], ids, why) if letter in letters else ids
    return Labelled(tuple(call.gives), tuple(letters[letter] for letter in made))


def attention(walk: ChannelPropagation, call: Call) -> Any:
    """scaled_dot_product_attention: heads are those of all three, the width of query and key is summed over."""
    query, key, value = (call.argument(place, name) for place, name in enumerate(("query", "key", "value")))
    ahead = list(matched(walk, call, [Labelled(each.shape[:-2], each.atoms[:-2]) for each in (query, key, value)]))
    width = walk.atoms.match(query.atoms[-1], key.atoms[-1], f"{call.node.name} meets them with what cannot shrink")
    if call.kwargs.get("scale") is None:
        walk.literal(call, "scale", query.shape[-1], width)
    for each in (key, value):
        walk.atoms.keep(each.atoms[-2], f"{call.node.name} attends to them")
    mask = call.argument(3, "attn_mask")
    if mask is not None:
        scores = Labelled((*query.shape[:-1], key.shape[-2]), (*ahead, query.atoms[-2], None))
        list(matched(walk, call, [scores, mask]))
    return Labelled(tuple(call.gives), (*ahead, query.atoms[-2], value.atoms[-1]))


def linear(walk: ChannelPropagation, call: Call) -> Any:
    """F.linear with weights that the graph reads by themselves."""
    given, weight, bias = call.args[0], call.argument(1, "weight"), call.argument(2, "bias")
    walk.atoms.match(given.atoms[-1], weight.atoms[1], f"{call.node.name} reads what cannot shrink")
    made = weight.atoms[0]
    if bias is not None:
        made = walk.atoms.match(made, bias.atoms[0], f"{call.node.name} adds what cannot shrink")
    return Labelled(tuple(call.gives), (*given.atoms[:-1], made))


def pooled(walk: ChannelPropagation, call: Call) -> Any:
    """Pooling and interpolation: channels by themselves, pixels stay."""
    given = call.args[0]
    for ids in given.atoms[2:]:
        walk.atoms.keep(ids, f"{call.node.name} pools them")

    def kept(gives: Any) -> Any:
        if isinstance(gives, Shape):
            return Labelled(tuple(gives), (*given.atoms[:2], *[None] * (len(gives) - 2)))
        return tuple(map(kept, gives))

    return kept(call.gives)


def same(names: Sequence[str], rule: Rule) -> dict[str, Rule]:
    """One rule under several names."""
    return dict.fromkeys(names, rule)


_UNARY = [
    *("relu", "relu_", "relu6", "gelu", "silu", "silu_", "sigmoid", "tanh", "hardswish", "hardsigmoid"),
    *("hardtanh", "leaky_relu", "elu", "celu", "selu", "softplus", "mish", "exp", "log", "log2", "sqrt"),
    *("rsqrt", "pow", "neg", "abs", "clamp", "clamp_", "dropout", "dropout1d", "dropout2d", "dropout3d"),
    *("alpha_dropout", "contiguous", "clone", "detach", "to", "type", "type_as", "float", "half"),
    *("bfloat16", "double", "square", "erf", "sin", "cos", "sign", "stochastic_depth", "drop_path"),
    *("round", "floor", "ceil", "nan_to_num", "reciprocal", "log1p", "expm1", "logsigmoid", "sigmoid_"),
    *("tanh_", "hardswish_", "mish_", "prelu", "requires_grad_", "_assert"),
]
_SEVERAL = [
    *("add", "sub", "mul", "truediv", "div", "iadd", "imul", "isub", "itruediv", "where", "maximum"),
    *("minimum", "addcmul", "addcdiv", "lerp", "masked_fill", "add_", "sub_", "mul_", "div_", "rsub", "eq"),
    *("ne", "lt", "gt", "le", "ge", "logical_not", "logical_and", "multiply", "divide", "subtract"),
]
_POOLS = [
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "upsample"),
    *("lp_pool2d", "max_pool1d", "avg_pool1d"),
]

RULES: dict[str, Rule] = {
    **same([*_UNARY, *_SEVERAL], elementwise),
    **same(("sum", "mean", "amax", "amin", "max", "min", "norm", "var", "std", "argmax", "logsumexp"), reduced),
    **same(("softmax", "log_softmax", "normalize", "cumsum", "Softmax", "LogSoftmax"), across),
    "layer_norm": layer_norm,
    **same(("matmul", "bmm"), matrix_product),
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    "linear": linear,
    **same(_POOLS, pooled),
}
