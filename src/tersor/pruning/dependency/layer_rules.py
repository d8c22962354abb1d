"""Rules for layers: what reads channels, what writes them, what hands each on by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from tersor.pruning.dependency.arithmetic_rules import RULES as ARITHMETIC
from tersor.pruning.dependency.arithmetic_rules import pooled
from tersor.pruning.dependency.propagation import Call, ChannelPropagation, Rule, fixed
from tersor.pruning.dependency.shape_rules import RULES as SHAPES
from tersor.pruning.dependency.shape_rules import reshaped
from tersor.pruning.dependency.slice_rules import RULES as PIECES
from tersor.pruning.dependency.swin_rules import RULES as WINDOWS
from tersor.pruning.dependency.union_find import Ids, Labelled


def rule_of(call: Call) -> Rule:
    """The rule for what a node calls."""
    if call.module is None:
        return FUNCTIONS.get(call.name, _unknown)
    for kinds, rule in _MODULES:
        if isinstance(call.module, kinds):
            return rule
    if call.name in _BY_NAME:
        return _BY_NAME[call.name]
    return per_channel


def _unknown(walk: ChannelPropagation, call: Call) -> Any:
    return walk.keep(call)


def convolution(walk: ChannelPropagation, call: Call) -> Any:
    """One that reads all channels, or reads them by groups, or hands each on by itself (depthwise)."""
    layer, given, name = call.module, call.args[0], str(call.node.target)
    assert isinstance(layer, _ConvNd)
    if layer.transposed:
        return walk.keep(call)
    if "Std" in call.name:  # its weights are standardised over what it reads
        walk.across.add(call.node)
    for ids in given.atoms[2:]:
        walk.atoms.keep(ids, f"{name} slides over them")
    read, groups = given.atoms[1], layer.groups
    if groups == layer.in_channels == layer.out_channels and groups > 1:
        made = walk.bind(name, "out", read)
    else:
        read = walk.bind(name, "in", read)
        made = walk.bound(name, "out", layer.out_channels)
        if groups > 1:
            made = _grouped(walk, read, made, groups, name)
    return Labelled(tuple(call.gives), (given.atoms[0], made, *[None] * (len(call.gives) - 2)))


def _grouped(walk: ChannelPropagation, read: Ids | None, made: Ids | None, groups: int, name: str) -> Ids | None:
    """Whole groups go where they are many, else the same number of each."""
    if read is None or made is None:
        walk.atoms.keep(read, f"{name} is grouped, and its other side cannot shrink")
        walk.atoms.keep(made, f"{name} is grouped, and its other side cannot shrink")
        return None
    sides = [read.reshape(groups, -1), made.reshape(groups, -1)]
    if groups >= sides[0].shape[1] or groups >= sides[1].shape[1]:
        walk.united(np.concatenate(sides, axis=1), 0)
    else:
        for side in sides:
            walk.united(side, 1)
    return made


def fully_connected(walk: ChannelPropagation, call: Call) -> Labelled:
    """Over the last dimension."""
    layer, given, name = call.module, call.args[0], str(call.node.target)
    assert isinstance(layer, nn.Linear)
    walk.bind(name, "in", given.atoms[-1])
    return Labelled(tuple(call.gives), (*given.atoms[:-1], walk.bound(name, "out", layer.out_features)))


def per_channel(walk: ChannelPropagation, call: Call) -> Any:
    """A layer that hands every channel on by itself: norms, scales, activations with a slope of their own."""
    layer, given = call.module, call.args[0] if call.args else None
    assert layer is not None
    if not isinstance(given, Labelled) or tuple(given.shape) != tuple(call.gives) or len(call.tensors) > 1:
        return walk.keep(call)
    own = [each for each in [*layer.parameters(), *layer.buffers()] if each.numel() > 1]
    if not own:
        return given
    sizes = {size for each in own for size in each.shape if size > 1}
    with_parts = any(layer.children()) and not isinstance(layer, _BatchNorm)  # timm's has an activation within
    if len(sizes) > 1 or any(each.numel() != max(each.shape) for each in own) or with_parts:
        return walk.keep(call)
    axis = _channel_axis(layer, given, sizes.pop())
    if axis is None:
        return walk.keep(call)
    name = str(call.node.target)
    ids = walk.bind(name, "out", given.atoms[axis])
    if "Norm" in call.name and not isinstance(layer, _BatchNorm):
        walk.across.add(call.node)
    groups = getattr(layer, "num_groups", 1)
    if ids is not None and groups > 1:
        rows = ids.reshape(groups, -1)
        walk.united(rows, 0 if groups >= rows.shape[1] else 1)
    return Labelled(given.shape, (*given.atoms[:axis], ids, *given.atoms[axis + 1 :]))


def _channel_axis(layer: nn.Module, given: Labelled, size: int) -> int | None:
    axes = [axis for axis, found in enumerate(given.shape) if found == size]
    if type(layer) is nn.LayerNorm:
        return len(given.shape) - 1
    if isinstance(layer, _BatchNorm | nn.GroupNorm):
        return 1
    tracked = [axis for axis in axes if given.atoms[axis] is not None]
    return (tracked or axes or [None])[0]


def multihead(walk: ChannelPropagation, call: Call) -> Any:
    """nn.MultiheadAttention: heads (or places of every head) go from query, key and value at once."""
    layer, name = call.module, str(call.node.target)
    assert isinstance(layer, nn.MultiheadAttention)
    tensors = [call.argument(place, each) for place, each in enumerate(("query", "key", "value"))]
    if getattr(layer, "in_proj_weight", None) is None or layer.bias_k is not None or layer.add_zero_attn:
        return walk.keep(call)
    why = f"{name} reads them beside what cannot shrink"
    read = tensors[0].atoms[-1]
    for each in tensors:
        read = walk.atoms.match(read, each.atoms[-1], why)
        for ids in each.atoms[:-1]:
            walk.atoms.keep(ids, f"{name} attends to them")
    walk.bind(f"{name}.in_proj_weight", "1", read)
    inner = walk.bound(f"{name}.in_proj_weight", "0", 3 * layer.embed_dim)
    assert inner is not None
    parts = inner.reshape(3, layer.num_heads, -1)
    walk.either(parts, 1, 2)
    if getattr(layer, "in_proj_bias", None) is not None:
        walk.bind(f"{name}.in_proj_bias", "0", inner)
    if not walk.inner:
        walk.places[name, "heads"] = parts[0, :, 0].copy()
    walk.bind(f"{name}.out_proj", "in", parts[2].reshape(-1))
    made = walk.bound(f"{name}.out_proj", "out", layer.embed_dim)
    shape, *rest = call.gives
    return (Labelled(tuple(shape), (*[None] * (len(shape) - 1), made)), *map(fixed, rest))


def pixel_shuffle(walk: ChannelPropagation, call: Call) -> Any:
    """(N, C r r, H, W) -> (N, C, H r, W r): the r r places of a channel go together."""
    given, gives = call.args[0], tuple(call.gives)
    if given.atoms[1] is None:
        return fixed(call.gives)
    made = walk.united(given.atoms[1].reshape(gives[1], -1), 0)
    return Labelled(gives, (given.atoms[0], made, None, None))


def _flattened(walk: ChannelPropagation, call: Call) -> Any:
    atoms, *_ = reshaped(walk, call.node, call.args[0], tuple(call.gives))
    return Labelled(tuple(call.gives), tuple(atoms))


_SPATIAL = tuple(
    kind
    for module in (nn.modules.pooling, nn.modules.upsampling, nn.modules.padding)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and kind is not nn.Module
)
_MODULES: list[tuple[Any, Rule]] = [
    (_ConvNd, convolution),
    (nn.Linear, fully_connected),
    (nn.MultiheadAttention, multihead),
    (_SPATIAL, pooled),
    ((nn.Flatten, nn.Unflatten), _flattened),
    ((nn.Softmax, nn.LogSoftmax), ARITHMETIC["softmax"]),
    (nn.PixelShuffle, pixel_shuffle),
    ((nn.LocalResponseNorm, nn.Softmax2d, nn.ChannelShuffle, nn.InstanceNorm1d), _unknown),
]
_BY_NAME: dict[str, Rule] = {}
FUNCTIONS: dict[str, Rule] = {**SHAPES, **PIECES, **ARITHMETIC, **WINDOWS, "pixel_shuffle": pixel_shuffle}
