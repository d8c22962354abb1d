"""What becomes of the parts into which a dimension is split: which of them can shrink.

(3, heads, width): the 3 are taken apart, so heads or width; (groups, channels) that are merged again in another order:
a shuffle, whose larger part shrinks.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from tersor.pruning.dependency.axes import blocks, order_of
from tersor.pruning.dependency.propagation import Call, ChannelPropagation, called, fixed
from tersor.pruning.dependency.shape_recording import Shape
from tersor.pruning.dependency.union_find import Labelled

_REDUCED = {
    *(
        "sum",
        "mean",
        "softmax",
        "amax",
        "amin",
        "max",
        "min",
        "argmax",
        "norm",
        "normalize",
        "var",
        "std",
        "log_softmax",
    )
}
_MOVED = {"permute", "transpose", "swapaxes", "swapdims", "movedim"}
_MERGED = {"view", "reshape", "flatten"}
_DEPTH = 12

Axes = dict[int, int]
"""Dimension of the split -> where it lies in a later value."""


def candidates(walk: ChannelPropagation, node: fx.Node, made: Sequence[int]) -> list[int]:
    """Those of the dimensions `made` that can shrink, outer ones first."""
    barred: set[int] = {axis for axis in made if walk.recorded[node][axis] == 1}
    shuffled: set[int] = set()
    _follow(walk, node, {axis: axis for axis in made}, barred, shuffled, _DEPTH)
    able = [axis for axis in made if axis not in barred]
    if shuffled:
        return [max(able, key=lambda axis: walk.recorded[node][axis])] if able else []
    return able


def _follow(
    walk: ChannelPropagation, node: fx.Node, axes: Axes, barred: set[int], shuffled: set[int], depth: int
) -> None:
    for user in node.users if depth else ():
        gives = walk.recorded[user]
        if user.op == "output" or (user.args and user.args[0] is not node and called(user) not in {"add", "mul"}):
            continue
        module = walk.graph.get_submodule(str(user.target)) if user.op == "call_module" else None
        args, kwargs = fx.map_arg((user.args, user.kwargs), lambda read: fixed(walk.recorded[read]))
        call = Call(user, called(user, module), tuple(args), dict(kwargs), gives, module)
        onward = _onward(walk, call, node, axes, barred, shuffled)
        if onward:
            _follow(walk, user, onward, barred, shuffled, depth - 1)


def _onward(
    walk: ChannelPropagation, call: Call, node: fx.Node, axes: Axes, barred: set[int], shuffled: set[int]
) -> Axes:
    """Where the dimensions lie behind one more node; what it makes of them is noted."""
    if call.name == "unbind":
        _bar(call, axes, barred, call.argument(1, "dim", 0))
    elif call.name == "getitem" and isinstance(call.args[0], Labelled):
        return _behind_index(call, axes, barred)
    elif call.name in _REDUCED:
        _bar(call, axes, barred, call.argument(1, "dim"))
    elif not isinstance(call.gives, Shape):
        return {}
    elif call.name in _MOVED:
        order = order_of(call)
        return {axis: order.index(place) for axis, place in axes.items()}
    elif call.name in _MERGED:
        _merged(walk.recorded[node], tuple(call.gives), axes, shuffled)
    elif tuple(call.gives) == tuple(walk.recorded[node]) and not (call.module and any(call.module.parameters())):
        return axes
    return {}


def _bar(call: Call, axes: Axes, barred: set[int], dimensions: int | Sequence[int] | None) -> None:
    rank = len(call.args[0].shape)
    if dimensions is None:
        barred.update(axes)
        return
    taken = {axis % rank for axis in ([dimensions] if isinstance(dimensions, int) else dimensions)}
    barred.update(axis for axis, place in axes.items() if place in taken)


def _behind_index(call: Call, axes: Axes, barred: set[int]) -> Axes:
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if not all(isinstance(each, int | slice) for each in index):
        return {}
    gone = [place for place, each in enumerate(index) if isinstance(each, int)]
    barred.update(axis for axis, place in axes.items() if place in gone)
    return {axis: place - sum(each < place for each in gone) for axis, place in axes.items() if place not in gone}


def _merged(read: Sequence[int], gives: Sequence[int], axes: Axes, shuffled: set[int]) -> None:
    """A shuffle: parts lie in one dimension again, in another order."""
    for block, made in blocks(read, gives):
        inside = [axis for axis, place in axes.items() if place in block]
        ordered = sorted(inside, key=lambda axis: axes[axis])
        if len(inside) > 1 and len(made) == 1 and ordered != sorted(inside):
            shuffled.update(inside)
