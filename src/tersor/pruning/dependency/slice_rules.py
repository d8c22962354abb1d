"""Coupling rules for operators that take parts of a dimension: slice, select, index, chunk, split, unbind."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.pruning.dependency.propagation import Call, ChannelPropagation, Rule
from tersor.pruning.dependency.union_find import TrackedShape


def getitem(_: ChannelPropagation, call: Call) -> Any:
    """One of the results of an operator that returns several."""
    values, index = call.args
    return values[index]


def take_slice(propagation: ChannelPropagation, call: Call) -> TrackedShape:
    """slice: a range of one dimension."""
    tensor = call.args[0]
    axis = call.argument(1, "dim", 0) % len(tensor.shape)
    ids, step = list(tensor.ids), call.argument(4, "step", 1)
    channels = ids[axis]
    if channels is not None and step != 1:
        propagation.sets.freeze(channels, f"{call.node.name} slices them with a step of {step}")
        ids[axis] = None
    elif channels is not None:
        start, stop, _ = slice(call.argument(2, "start"), call.argument(3, "end")).indices(len(channels))
        if start:
            propagation.track_argument(call, "args.2", start, channels[:start])
        if stop < len(channels):
            propagation.track_argument(call, "args.3", stop, channels[:stop])
        ids[axis] = channels[start:stop]
        propagation.parts.append(channels[start:stop])
    return TrackedShape(tuple(call.output), tuple(ids))


def select(propagation: ChannelPropagation, call: Call) -> TrackedShape:
    """select: one index of a dimension."""
    tensor = call.args[0]
    axis = call.argument(1, "dim", 0) % len(tensor.shape)
    propagation.sets.freeze(tensor.ids[axis], f"{call.node.name} selects one of them by its index")
    return TrackedShape(tuple(call.output), (*tensor.ids[:axis], *tensor.ids[axis + 1 :]))


def index(propagation: ChannelPropagation, call: Call) -> Any:
    """index: table[indices]. The number of rows is fixed; columns can be removed."""
    tensor, indices = call.args
    if len(indices) != 1 or not isinstance(indices[0], TrackedShape):
        return propagation.freeze(call)
    propagation.sets.freeze(tensor.ids[0], f"{call.node.name} selects rows by their index")
    return TrackedShape(tuple(call.output), (*[None] * len(indices[0].shape), *tensor.ids[1:]))


def split(propagation: ChannelPropagation, call: Call) -> Any:
    """chunk, split, tensor_split, unbind."""
    tensor = call.args[0]
    dimension = call.argument(1 if call.name == "unbind" else 2, "dim", 0) % len(tensor.shape)
    ids = tensor.ids[dimension]
    before, after = tensor.ids[:dimension], tensor.ids[dimension + 1 :]
    if call.name == "unbind":
        propagation.sets.freeze(ids, f"{call.node.name} unbinds them")
        return tuple(TrackedShape(tuple(shape), (*before, *after)) for shape in call.output)
    sizes = [shape[dimension] for shape in call.output]
    if ids is not None:
        propagation.axes[call.node.name, "sections=" + ",".join(map(str, sizes))] = ids
    parts = [None] * len(sizes) if ids is None else np.split(ids, np.cumsum(sizes)[:-1])
    propagation.parts += [part for part in parts if part is not None]
    return tuple(
        TrackedShape(tuple(shape), (*before, part, *after)) for shape, part in zip(call.output, parts, strict=True)
    )


RULES: dict[str, Rule] = {
    "getitem": getitem,
    "slice": take_slice,
    "select": select,
    "index": index,
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split", "unbind"), split),
}
