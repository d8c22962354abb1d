"""Which axes correspond when a dimension is split or merged, and which part of a split can be pruned.

In (3, heads, width), the axis of size 3 is unbound later, so heads or width can be pruned. If (groups, channels) are
merged again in another order, they are a channel shuffle, and its larger part is pruned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import fx

from tersor.graph.aten import called_name
from tersor.pruning.dependency.propagation import Call, ChannelPropagation, frozen
from tersor.pruning.dependency.shape_recording import Shape

TRANSPOSED = ("transpose", "swapaxes", "swapdims")
_REDUCED = {
    *("sum", "mean", "softmax", "log_softmax", "amax", "amin", "max", "min", "argmax", "var", "std"),
    "linalg_vector_norm",
}
_PERMUTED = {"permute", *TRANSPOSED, "movedim", "moveaxis", "t"}
_MERGED = {"reshape", "flatten", "reshape_as", "view_as"}
_DEPTH = 12

Axes = dict[int, int]
"""Axis of the split -> its position in a later value."""


def corresponding_axes(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest groups of axes that hold the same elements in two shapes; axes of size 1 are left out."""
    left = [axis for axis, size in enumerate(before) if size != 1]
    right = [axis for axis, size in enumerate(after) if size != 1]
    while left and right:
        group = [left.pop(0)], [right.pop(0)]
        while (old := math.prod(before[axis] for axis in group[0])) != (
            new := math.prod(after[axis] for axis in group[1])
        ):
            if old < new:
                group[0].append(left.pop(0))
            else:
                group[1].append(right.pop(0))
        yield group


def permutation(call: Call) -> list[int]:
    """The old axis of every new one: for permute, transpose, movedim, t."""
    rank = len(call.args[0].shape)
    order = list(range(rank))
    if call.name == "permute":
        return [axis % rank for axis in call.args[1]]
    if call.name in ("t", "numpy_T"):
        return order[::-1]
    first, second = (axis % rank for axis in call.args[1:3])
    if call.name in ("movedim", "moveaxis"):
        order.insert(second, order.pop(first))
    else:
        order[first], order[second] = order[second], order[first]
    return order


def prunable_parts(propagation: ChannelPropagation, node: fx.Node, axes: Sequence[int]) -> list[int]:
    """Return those of the `axes` of a split that can be pruned, outer ones first."""
    excluded: set[int] = {axis for axis in axes if propagation.recorded[node][axis] == 1}
    shuffled: set[int] = set()
    _follow(propagation, node, {axis: axis for axis in axes}, excluded, shuffled, _DEPTH)
    prunable = [axis for axis in axes if axis not in excluded]
    if shuffled:
        return [max(prunable, key=lambda axis: propagation.recorded[node][axis])] if prunable else []
    return prunable


def _follow(
    propagation: ChannelPropagation, node: fx.Node, axes: Axes, excluded: set[int], shuffled: set[int], depth: int
) -> None:
    recorded = propagation.recorded
    for user in node.users if depth else ():
        if user.op == "output" or (user.args and user.args[0] is not node and called_name(user) not in {"add", "mul"}):
            continue
        module = propagation.graph.get_submodule(str(user.target)) if user.op == "call_module" else None
        args, kwargs = fx.map_arg((user.args, user.kwargs), lambda read: frozen(recorded[read]))
        call = Call(user, called_name(user, module), tuple(args), dict(kwargs), recorded[user], module)
        next_axes = _after_call(call, tuple(recorded[node]), axes, excluded, shuffled)
        if next_axes:
            _follow(propagation, user, next_axes, excluded, shuffled, depth - 1)


def _after_call(call: Call, shape: tuple[int, ...], axes: Axes, excluded: set[int], shuffled: set[int]) -> Axes:
    """The positions of the axes after one more node that reads a value of `shape`."""
    if call.name == "unbind":
        _exclude(call, axes, excluded, call.argument(1, "dim", 0))
    elif call.name == "select":
        return _after_select(call, axes, excluded)
    elif call.name in _REDUCED:
        _exclude(call, axes, excluded, call.argument(2 if call.name == "linalg_vector_norm" else 1, "dim"))
    elif not isinstance(call.output, Shape):
        return {}
    elif call.name in _PERMUTED:
        order = permutation(call)
        return {axis: order.index(position) for axis, position in axes.items()}
    elif call.name in _MERGED:
        _find_shuffle(shape, tuple(call.output), axes, shuffled)
    elif tuple(call.output) == shape and (call.module is None or next(call.module.parameters(), None) is None):
        return axes
    return {}


def _exclude(call: Call, axes: Axes, excluded: set[int], dimensions: int | Sequence[int] | None) -> None:
    rank = len(call.args[0].shape)
    if dimensions is None:
        excluded.update(axes)
        return
    taken = {axis % rank for axis in ([dimensions] if isinstance(dimensions, int) else dimensions)}
    excluded.update(axis for axis, position in axes.items() if position in taken)


def _after_select(call: Call, axes: Axes, excluded: set[int]) -> Axes:
    selected = call.args[1] % len(call.args[0].shape)
    excluded.update(axis for axis, position in axes.items() if position == selected)
    return {axis: position - (position > selected) for axis, position in axes.items() if position != selected}


def _find_shuffle(before: Sequence[int], after: Sequence[int], axes: Axes, shuffled: set[int]) -> None:
    """A channel shuffle: the parts are merged into one dimension again, in another order."""
    for old, new in corresponding_axes(before, after):
        inside = [axis for axis, position in axes.items() if position in old]
        ordered = sorted(inside, key=lambda axis: axes[axis])
        if len(inside) > 1 and len(new) == 1 and ordered != sorted(inside):
            shuffled.update(inside)
