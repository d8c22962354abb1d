"""Coupling rules for operators that rearrange: reshape, permute, concatenate, pad, expand, repeat, roll."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import fx

from tersor.pruning.dependency.propagation import Call, ChannelPropagation, Rule
from tersor.pruning.dependency.split_axes import TRANSPOSED, corresponding_axes, permutation, prunable_parts
from tersor.pruning.dependency.union_find import Ids, TrackedShape

AxisIds = list[Ids | None]


def reshape(propagation: ChannelPropagation, call: Call) -> TrackedShape:
    """reshape, flatten, unflatten, squeeze, unsqueeze."""
    tensor, output = call.args[0], tuple(call.output)
    ids, mixed = reshaped(propagation, call.node, tensor, output)
    _track_sizes(propagation, call, output, [None if axis in mixed else each for axis, each in enumerate(ids)])
    return TrackedShape(output, tuple(ids))


def reshaped(
    propagation: ChannelPropagation, node: fx.Node, tensor: TrackedShape, output: tuple[int, ...]
) -> tuple[AxisIds, set[int]]:
    """The ids of the output, and which of its axes merge the batch with channels."""
    ids: AxisIds = [None] * len(output)
    mixed: set[int] = set()
    for old, new in corresponding_axes(tensor.shape, output):
        tracked = [axis for axis in old if tensor.ids[axis] is not None]
        if not tracked:
            continue
        if len(old) == len(new) == 1:
            ids[new[0]] = tensor.ids[old[0]]
            continue
        if 0 in old:
            mixed.update(new)
            propagation.mixes_batch = True
        for axis in tracked[:-1]:
            propagation.sets.freeze(tensor.ids[axis], f"{node.name} merges two dimensions of channels")
        sizes = [tensor.shape[axis] for axis in old]
        position = old.index(tracked[-1])
        channels = tensor.ids[tracked[-1]]
        assert channels is not None
        flat = np.broadcast_to(channels.reshape([-1] + [1] * (len(sizes) - 1 - position)), sizes).reshape(-1)
        if len(new) == 1:
            ids[new[0]] = flat
        else:
            axis, kept = _split(propagation, node, flat, output, new)
            if kept is not None:
                ids[new[axis]] = kept
    return ids, mixed


def _split(
    propagation: ChannelPropagation, node: fx.Node, flat: Ids, output: Sequence[int], axes: Sequence[int]
) -> tuple[int, Ids | None]:
    """Split one dimension into several. Return the number of the one whose size can change, and its ids."""
    parts = flat.reshape([output[axis] for axis in axes])
    for number in range(len(axes)):
        rows = np.moveaxis(parts, number, 0).reshape(parts.shape[number], -1)
        if (rows == rows[:, :1]).all():
            return number, rows[:, 0].copy()
    prunable = [axes.index(axis) for axis in prunable_parts(propagation, node, axes)]
    if not prunable:
        propagation.sets.freeze(flat, f"{node.name} splits them into parts of fixed size")
        return 0, None
    return prunable[-1 if propagation.inner else 0], propagation.merge_split(parts, prunable[0], prunable[-1])


def _track_sizes(propagation: ChannelPropagation, call: Call, output: Sequence[int], ids: AxisIds) -> None:
    """Constant sizes among the arguments: one by one, or as a list."""
    if call.name == "unflatten":
        start = call.args[1] % len(call.args[0].shape)
        for position, size in enumerate(call.args[2]):
            if size != -1:
                axis = start + position
                propagation.track_argument(call, f"args.2.{position}", output[axis], ids[axis])
    elif call.name in {"reshape", "expand"}:
        for axis, (size, each) in enumerate(zip(call.args[1], ids, strict=True)):
            if isinstance(size, int) and size != -1:
                propagation.track_argument(call, f"args.1.{axis}", output[axis], each)


def permute(_: ChannelPropagation, call: Call) -> TrackedShape:
    """permute, transpose, movedim, t."""
    order = permutation(call)
    tensor = call.args[0]
    return TrackedShape(tuple(tensor.shape[axis] for axis in order), tuple(tensor.ids[axis] for axis in order))


def concatenate(propagation: ChannelPropagation, call: Call) -> Any:
    """cat: ids are concatenated along one dimension and coupled along all others."""
    tensors = list(call.args[0])
    if not all(isinstance(each, TrackedShape) for each in tensors):
        return propagation.freeze(call)
    dimension = call.argument(1, "dim", 0) % len(call.output)
    ids = list(broadcast(propagation, call, tensors, skip=dimension))
    along = [each.ids[dimension] for each in tensors]
    if any(each is not None for each in along):
        parts = [
            _frozen_ids(propagation, tensor.shape[dimension]) if each is None else each
            for tensor, each in zip(tensors, along, strict=True)
        ]
        ids[dimension] = np.concatenate(parts)
    return TrackedShape(tuple(call.output), tuple(ids))


def stack(propagation: ChannelPropagation, call: Call) -> Any:
    """stack: a new dimension without ids; all others are coupled."""
    tensors = list(call.args[0])
    if not all(isinstance(each, TrackedShape) for each in tensors):
        return propagation.freeze(call)
    dimension = call.argument(1, "dim", 0) % len(call.output)
    ids = list(broadcast(propagation, call, tensors))
    return TrackedShape(tuple(call.output), (*ids[:dimension], None, *ids[dimension:]))


def _frozen_ids(propagation: ChannelPropagation, size: int) -> Ids:
    ids = propagation.sets.new(size)
    propagation.sets.freeze(ids, "they are concatenated with a tensor whose size can change")
    return ids


def broadcast(
    propagation: ChannelPropagation, call: Call, tensors: Sequence[TrackedShape], skip: int | None = None
) -> Iterator[Ids | None]:
    """Couple the dimensions of broadcast tensors, aligned at the last one; a size of 1 couples with nothing."""
    rank = max(len(each.shape) for each in tensors)
    reason = f"{call.node.name} ({call.name}) combines them with a tensor of fixed size"
    for axis in range(-rank, 0):
        aligned = [(each.ids[axis], each.shape[axis]) for each in tensors if len(each.shape) >= -axis]
        full = [ids for ids, size in aligned if size > 1 or skip is not None]
        if rank + axis == skip or not full:
            yield None
            continue
        first = full[0]
        for ids in full[1:]:
            first = propagation.sets.couple(first, ids, reason)
        yield first


def pad(propagation: ChannelPropagation, call: Call) -> Any:
    """pad: constant channels before and after, which can be removed like any other."""
    amounts = list(call.args[1])
    mode = call.argument(2, "mode", "constant")
    padded = list(call.args[0].ids)
    for number in range(len(amounts) // 2):
        axis = len(padded) - 1 - number
        ids, (before, after) = padded[axis], amounts[2 * number : 2 * number + 2]
        if ids is None or not (before or after):
            continue
        if mode != "constant" or before < 0 or after < 0:
            propagation.sets.freeze(ids, f"{call.node.name} pads them")
            padded[axis] = None
            continue
        new = propagation.sets.new(before), propagation.sets.new(after)
        propagation.track_argument(call, f"args.1.{2 * number}", before, new[0] if before else None)
        propagation.track_argument(call, f"args.1.{2 * number + 1}", after, new[1] if after else None)
        padded[axis] = np.concatenate([new[0], ids, new[1]])
    return TrackedShape(tuple(call.output), tuple(padded))


def expand(propagation: ChannelPropagation, call: Call) -> TrackedShape:
    """expand: dimensions of size 1 are repeated, all others keep their ids."""
    tensor, output = call.args[0], tuple(call.output)
    ids: AxisIds = [*[None] * (len(output) - len(tensor.shape)), *tensor.ids]
    _track_sizes(propagation, call, output, ids)
    return TrackedShape(output, tuple(ids))


def repeat(_: ChannelPropagation, call: Call) -> TrackedShape:
    """repeat: ids are tiled."""
    tensor, output = call.args[0], tuple(call.output)
    ids: AxisIds = [*[None] * (len(output) - len(tensor.shape)), *tensor.ids]
    tiles = [None if each is None else np.tile(each, size // len(each)) for each, size in zip(ids, output, strict=True)]
    return TrackedShape(output, tuple(tiles))


def roll(propagation: ChannelPropagation, call: Call) -> Any:
    """roll, flip: the dimensions along which elements move are frozen."""
    tensor = call.args[0]
    dimensions = call.argument(2 if call.name == "roll" else 1, "dims")
    if dimensions is None:
        return propagation.freeze(call)
    for axis in [dimensions] if isinstance(dimensions, int) else dimensions:
        propagation.sets.freeze(tensor.ids[axis], f"{call.node.name} moves them")
    return tensor


def repeat_interleave(propagation: ChannelPropagation, call: Call) -> Any:
    """repeat_interleave: its dimension is frozen."""
    tensor, dimension = call.args[0], call.argument(2, "dim")
    if dimension is None:
        return propagation.freeze(call)
    propagation.sets.freeze(tensor.ids[dimension], f"{call.node.name} repeats them")
    ids = list(tensor.ids)
    ids[dimension] = None
    return TrackedShape(tuple(call.output), tuple(ids))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "Flatten", "Unflatten"), reshape),
    **dict.fromkeys(("reshape_as", "view_as"), reshape),
    **dict.fromkeys(("permute", *TRANSPOSED, "movedim", "moveaxis", "t", "numpy_T"), permute),
    **dict.fromkeys(("cat", "concat", "concatenate"), concatenate),
    "pad": pad,
    **dict.fromkeys(("expand", "expand_as"), expand),
    "repeat": repeat,
    "stack": stack,
    "repeat_interleave": repeat_interleave,
    **dict.fromkeys(("roll", "flip"), roll),
}
