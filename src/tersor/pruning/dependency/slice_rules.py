"""Coupling rules for operators that take parts of a dimension: indexing, chunk, split, unbind."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.pruning.dependency.propagation import Call, ChannelPropagation, Rule
from tersor.pruning.dependency.union_find import Ids, TrackedShape


def getitem(propagation: ChannelPropagation, call: Call) -> Any:
    """values[...]: whole dimensions, slices, single indices."""
    tensor, index = call.args
    if not isinstance(tensor, TrackedShape):
        return tensor[index]
    index = index if isinstance(index, tuple) else (index,)
    if any(isinstance(each, TrackedShape | list) for each in index):
        return _index_by_tensor(propagation, call, tensor, index)
    indexed = sum(each is not None and each is not Ellipsis for each in index)
    if Ellipsis not in index:
        index = (*index, Ellipsis)
    ellipsis = index.index(Ellipsis)
    nested = isinstance(call.node.args[1], tuple)
    steps = [(each, f"args.1.{number}" if nested else "args.1") for number, each in enumerate(index)]
    steps[ellipsis : ellipsis + 1] = [(slice(None), "")] * (len(tensor.shape) - indexed)
    output: list[Ids | None] = []
    axis = 0
    for each, path in steps:
        if each is None:
            output.append(None)
            continue
        ids = tensor.ids[axis]
        if isinstance(each, slice):
            output.append(_slice(propagation, call, ids, each, path))
        else:
            propagation.sets.freeze(ids, f"{call.node.name} selects one of them by its index")
        axis += 1
    return TrackedShape(tuple(call.output), tuple(output))


def _slice(propagation: ChannelPropagation, call: Call, ids: Ids | None, part: slice, path: str) -> Ids | None:
    if ids is None or part == slice(None):
        return ids
    if part.step not in {None, 1}:
        propagation.sets.freeze(ids, f"{call.node.name} selects every {part.step}th of them")
        return None
    start, stop, _ = part.indices(len(ids))
    if part.start is not None and start:
        propagation.track_argument(call, f"{path}.start", start, ids[:start])
    if part.stop is not None and stop < len(ids):
        propagation.track_argument(call, f"{path}.stop", stop, ids[:stop])
    return ids[start:stop]


def _index_by_tensor(propagation: ChannelPropagation, call: Call, tensor: TrackedShape, index: tuple[Any, ...]) -> Any:
    """table[indices]: the rows are frozen, their columns can shrink."""
    if len(index) != 1 or not isinstance(index[0], TrackedShape):
        return propagation.freeze(call)
    propagation.sets.freeze(tensor.ids[0], f"{call.node.name} selects rows by their index")
    return TrackedShape(tuple(call.output), (*[None] * len(index[0].shape), *tensor.ids[1:]))


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
    starts = np.cumsum([0, *sizes]).tolist()
    return tuple(
        TrackedShape(tuple(shape), (*before, None if ids is None else ids[start : start + size], *after))
        for shape, start, size in zip(call.output, starts, sizes, strict=False)
    )


RULES: dict[str, Rule] = {
    "getitem": getitem,
    **dict.fromkeys(("chunk", "split", "tensor_split", "unbind", "split_with_sizes"), split),
}
