"""Rules for operators that take a part: slices, single places, rows of a table, chunks."""

from __future__ import annotations

from typing import Any

import numpy as np

from tersor.pruning.dependency.propagation import Call, ChannelPropagation, Rule
from tersor.pruning.dependency.union_find import Ids, Labelled

Atoms = list[Ids | None]


def slicing(walk: ChannelPropagation, call: Call) -> Any:
    """values[...]: whole dimensions, slices, single places."""
    given, index = call.args
    if not isinstance(given, Labelled):
        return given[index]
    index = index if isinstance(index, tuple) else (index,)
    if any(isinstance(each, Labelled | list) for each in index):
        return _by_tensor(walk, call, given, index)
    wanted = sum(each is not None and each is not Ellipsis for each in index)
    missing = len(given.shape) - wanted
    if Ellipsis not in index:
        index = (*index, Ellipsis)
    place = index.index(Ellipsis)
    path = "args.1" if isinstance(call.node.args[1], tuple) else ""
    every = [(each, f"{path}.{number}" if path else "args.1") for number, each in enumerate(index)]
    every[place : place + 1] = [(slice(None), "")] * missing
    atoms: Atoms = []
    axis = 0
    for each, where in every:
        if each is None:
            atoms.append(None)
            continue
        ids = given.atoms[axis]
        if isinstance(each, slice):
            atoms.append(_sliced(walk, call, ids, each, where))
        else:
            walk.atoms.keep(ids, f"{call.node.name} takes one of them by its number")
        axis += 1
    return Labelled(tuple(call.gives), tuple(atoms))


def _sliced(walk: ChannelPropagation, call: Call, ids: Ids | None, part: slice, where: str) -> Ids | None:
    if ids is None or part == slice(None):
        return ids
    if part.step not in {None, 1}:
        walk.atoms.keep(ids, f"{call.node.name} takes every {part.step}th of them")
        return None
    start, stop, _ = part.indices(len(ids))
    if part.start is not None and start:
        walk.literal(call, f"{where}.start", start, ids[:start])
    if part.stop is not None and stop < len(ids):
        walk.literal(call, f"{where}.stop", stop, ids[:stop])
    return ids[start:stop]


def _by_tensor(walk: ChannelPropagation, call: Call, given: Labelled, index: tuple[Any, ...]) -> Any:
    """table[numbers]: rows by number stay, what a row holds may shrink."""
    if len(index) != 1 or not isinstance(index[0], Labelled):
        return walk.keep(call)
    walk.atoms.keep(given.atoms[0], f"{call.node.name} takes rows by their number")
    return Labelled(tuple(call.gives), (*[None] * len(index[0].shape), *given.atoms[1:]))


def pieces(walk: ChannelPropagation, call: Call) -> Any:
    """chunk, split, tensor_split, unbind."""
    given = call.args[0]
    dimension = call.argument(1 if call.name == "unbind" else 2, "dim", 0) % len(given.shape)
    ids = given.atoms[dimension]
    rest = given.atoms[:dimension], given.atoms[dimension + 1 :]
    if call.name == "unbind":
        walk.atoms.keep(ids, f"{call.node.name} takes them apart")
        return tuple(Labelled(tuple(shape), (*rest[0], *rest[1])) for shape in call.gives)
    sizes = [shape[dimension] for shape in call.gives]
    if ids is not None:
        walk.places[call.node.name, "sections=" + ",".join(map(str, sizes))] = ids
    starts = np.cumsum([0, *sizes]).tolist()
    return tuple(
        Labelled(tuple(shape), (*rest[0], None if ids is None else ids[start : start + size], *rest[1]))
        for shape, start, size in zip(call.gives, starts, sizes, strict=False)
    )


RULES: dict[str, Rule] = {
    "getitem": slicing,
    **dict.fromkeys(("chunk", "split", "tensor_split", "unbind", "split_with_sizes"), pieces),
}
