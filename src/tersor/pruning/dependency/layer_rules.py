"""Coupling rules for layers: the input and output channels of each, and which of them are coupled."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from tersor.pruning.dependency import arithmetic_rules, shape_rules, slice_rules
from tersor.pruning.dependency.propagation import Call, ChannelPropagation, Rule, frozen
from tersor.pruning.dependency.union_find import Ids, TrackedShape


def rule_of(call: Call) -> Rule:
    """The rule for the function, method or module that a node calls."""
    if call.module is None:
        return _FUNCTIONS.get(call.name, _no_rule)
    return next((rule for kinds, rule in _MODULES if isinstance(call.module, kinds)), per_channel)


def _no_rule(propagation: ChannelPropagation, call: Call) -> Any:
    return propagation.freeze(call)


def convolution(propagation: ChannelPropagation, call: Call) -> Any:
    """A convolution, also a transposed one: over all channels, grouped, or depthwise."""
    layer, tensor, name = call.module, call.args[0], str(call.node.target)
    assert isinstance(layer, _ConvNd)
    if layer.transposed and layer.groups > 1:
        return propagation.freeze(call, f"{name} is a grouped transposed convolution")
    for ids in tensor.ids[2:]:
        propagation.sets.freeze(ids, f"{name} convolves along them")
    read, groups = tensor.ids[1], layer.groups
    if groups == layer.in_channels == layer.out_channels and groups > 1:
        written = propagation.bind(name, "out", read)
    else:
        read = propagation.bind(name, "in", read)
        written = propagation.ids_of(name, "out", layer.out_channels)
        if groups > 1:
            written = _couple_groups(propagation, read, written, groups, name)
    return TrackedShape(tuple(call.output), (tensor.ids[0], written, *[None] * (len(call.output) - 2)))


def _couple_groups(
    propagation: ChannelPropagation, read: Ids | None, written: Ids | None, groups: int, name: str
) -> Ids | None:
    """Whole groups are removed where there are many; else the same channels of every group."""
    if read is None or written is None:
        propagation.sets.couple(
            read,
            written,
            f"{name} is a grouped layer: its input and output channels must be removed together, and those on one side "
            "cannot be removed",
        )
        return None
    sides = [read.reshape(groups, -1), written.reshape(groups, -1)]
    if groups >= sides[0].shape[1] or groups >= sides[1].shape[1]:
        propagation.merge(np.concatenate(sides, axis=1), 0)
    else:
        for side in sides:
            propagation.merge(side, 1)
    return written


def fully_connected(propagation: ChannelPropagation, call: Call) -> TrackedShape:
    """nn.Linear over the last dimension."""
    layer, tensor, name = call.module, call.args[0], str(call.node.target)
    assert isinstance(layer, nn.Linear)
    propagation.bind(name, "in", tensor.ids[-1])
    return TrackedShape(tuple(call.output), (*tensor.ids[:-1], propagation.ids_of(name, "out", layer.out_features)))


def per_channel(propagation: ChannelPropagation, call: Call) -> Any:
    """Layers with one parameter for each channel: norms, scales, activations with a learned slope."""
    layer, tensor = call.module, call.args[0] if call.args else None
    assert layer is not None
    if not isinstance(tensor, TrackedShape) or tuple(tensor.shape) != tuple(call.output) or len(call.tensors) > 1:
        return propagation.freeze(call)
    own = [each for each in [*layer.parameters(), *layer.buffers()] if each.numel() > 1]
    if not own:
        return tensor
    if any(each.ndim > 1 for each in own) or len({len(each) for each in own}) > 1:
        return propagation.freeze(call)
    axis = len(tensor.shape) - 1 if isinstance(layer, nn.LayerNorm | nn.RMSNorm) else 1
    if tensor.shape[axis] != len(own[0]):
        return propagation.freeze(call)
    ids = propagation.bind(str(call.node.target), "out", tensor.ids[axis])
    if "Norm" in call.name and not isinstance(layer, _BatchNorm):
        propagation.cross_channel.add(call.node)
    groups = getattr(layer, "num_groups", 1)
    if ids is not None and groups > 1:
        rows = ids.reshape(groups, -1)
        propagation.merge(rows, 0 if groups >= rows.shape[1] else 1)
    return TrackedShape(tensor.shape, (*tensor.ids[:axis], ids, *tensor.ids[axis + 1 :]))


def pixel_shuffle(propagation: ChannelPropagation, call: Call) -> Any:
    """(N, C r r, H, W) -> (N, C, H r, W r): the r r inputs of an output channel are coupled."""
    tensor, output = call.args[0], tuple(call.output)
    if tensor.ids[1] is None:
        return frozen(call.output)
    written = propagation.merge(tensor.ids[1].reshape(output[1], -1), 0)
    return TrackedShape(output, (tensor.ids[0], written, None, None))


def _flatten(propagation: ChannelPropagation, call: Call) -> Any:
    ids, _ = shape_rules.reshaped(propagation, call.node, call.args[0], tuple(call.output))
    return TrackedShape(tuple(call.output), tuple(ids))


_SPATIAL = tuple(
    kind
    for module in (nn.modules.pooling, nn.modules.upsampling, nn.modules.padding)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and kind is not nn.Module
)
_MODULES: list[tuple[Any, Rule]] = [
    (_ConvNd, convolution),
    (nn.Linear, fully_connected),
    (_SPATIAL, arithmetic_rules.pooling),
    ((nn.Flatten, nn.Unflatten), _flatten),
    ((nn.Softmax, nn.LogSoftmax), arithmetic_rules.along_dimension),
    (nn.PixelShuffle, pixel_shuffle),
    ((nn.LocalResponseNorm, nn.Softmax2d, nn.ChannelShuffle, nn.InstanceNorm1d), _no_rule),
]
_FUNCTIONS: dict[str, Rule] = {
    **shape_rules.RULES,
    **slice_rules.RULES,
    **arithmetic_rules.RULES,
    "pixel_shuffle": pixel_shuffle,
}
