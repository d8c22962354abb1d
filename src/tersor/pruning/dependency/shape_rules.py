"""Rules for operators that move places and compute nothing: reshape, permute, slice, split, concatenation, padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import fx

from tersor.pruning.dependency.axes import blocks, order_of
from tersor.pruning.dependency.propagation import Call, ChannelPropagation, Rule
from tersor.pruning.dependency.split_axes import candidates
from tersor.pruning.dependency.union_find import Ids, Labelled

Atoms = list[Ids | None]


def reshape(walk: ChannelPropagation, call: Call) -> Labelled:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze: sizes on both sides that hold the same are matched."""
    given, gives = call.args[0], tuple(call.gives)
    atoms, mixed, parts = reshaped(walk, call.node, given, gives)
    _sizes(walk, call, 1, gives, [None if axis in mixed else each for axis, each in enumerate(atoms)])
    _pin(walk, call, gives, parts - mixed)
    return Labelled(gives, tuple(atoms))


def reshaped(
    walk: ChannelPropagation, node: fx.Node, given: Labelled, gives: tuple[int, ...]
) -> tuple[Atoms, set[int], set[int]]:
    """The atoms of the result, which of its dimensions hold several images too, and which are parts of channels."""
    atoms: Atoms = [None] * len(gives)
    mixed: set[int] = set()
    parts: set[int] = set()
    for read, made in blocks(given.shape, gives):
        tracked = [axis for axis in read if given.atoms[axis] is not None]
        if not tracked:
            continue
        if len(read) == len(made) == 1:
            atoms[made[0]] = given.atoms[read[0]]
            continue
        if 0 in read:
            mixed.update(made)
            walk.mixed = True
        parts.update(made)
        for axis in tracked[:-1]:
            walk.atoms.keep(given.atoms[axis], f"{node.name} merges two dimensions of channels")
        sizes = [given.shape[axis] for axis in read]
        place = read.index(tracked[-1])
        ids = given.atoms[tracked[-1]]
        assert ids is not None
        whole = np.broadcast_to(ids.reshape([-1] + [1] * (len(sizes) - 1 - place)), sizes).reshape(-1)
        if len(made) == 1:
            atoms[made[0]] = whole
        else:
            axis, carried = split(walk, node, whole, gives, made)
            if carried is not None:
                atoms[made[axis]] = carried
    return atoms, mixed, parts


def split(
    walk: ChannelPropagation, node: fx.Node, whole: Ids, gives: Sequence[int], made: Sequence[int]
) -> tuple[int, Ids | None]:
    """One dimension becomes several: which of them can shrink, and its atoms."""
    parts = whole.reshape([gives[axis] for axis in made])
    for axis in range(len(made)):
        rows = np.moveaxis(parts, axis, 0).reshape(parts.shape[axis], -1)
        if (rows == rows[:, :1]).all():
            return axis, rows[:, 0].copy()
    able = [made.index(axis) for axis in candidates(walk, node, made)]
    if not able:
        walk.atoms.keep(whole, f"{node.name} splits them into parts that cannot shrink")
        return 0, None
    return able[-1 if walk.inner else 0], walk.either(parts, able[0], able[-1])


def _sizes(walk: ChannelPropagation, call: Call, first: int, gives: Sequence[int], atoms: Atoms) -> None:
    """Sizes that are arguments: one by one, or as a list."""
    if call.name not in {"view", "reshape", "expand", "unflatten", "new_zeros", "zeros"}:
        return None
    if call.name == "unflatten":
        return _unflattened(walk, call, gives, atoms)
    several = len(call.args) > first and isinstance(call.args[first], tuple | list)
    sizes = call.args[first] if several else call.args[first:]
    for axis, (size, ids) in enumerate(zip(sizes, atoms, strict=False)):
        if isinstance(size, int) and size != -1:
            walk.literal(call, f"args.{first}.{axis}" if several else f"args.{first + axis}", gives[axis], ids)
    return None


def _pin(walk: ChannelPropagation, call: Call, gives: Sequence[int], axes: set[int]) -> None:
    """Sizes that are computed from what may shrink by itself (embedding / heads) become numbers when it does."""
    if call.name not in {"view", "reshape"}:
        return
    several = isinstance(call.node.args[1], tuple | list)
    sizes = call.node.args[1] if several else call.node.args[1:]
    assert isinstance(sizes, tuple | list)
    for axis in axes:
        size = sizes[axis]
        if isinstance(size, fx.Node):
            sources = [ids for each in _sources(walk, size) for ids in each.atoms if ids is not None]
            if sources:
                path = f"args.1.{axis}" if several else f"args.{1 + axis}"
                walk.literal(call, f"pin {path}", gives[axis], np.concatenate(sources))


def _sources(walk: ChannelPropagation, node: fx.Node) -> Iterator[Labelled]:
    """The tensors whose sizes a number was computed from."""
    value = walk.values[node]
    if isinstance(value, Labelled):
        yield value
    else:
        for read in node.all_input_nodes:
            yield from _sources(walk, read)


def _unflattened(walk: ChannelPropagation, call: Call, gives: Sequence[int], atoms: Atoms) -> None:
    start = call.args[1] % len(call.args[0].shape)
    for place, size in enumerate(call.args[2]):
        if size != -1:
            walk.literal(call, f"args.2.{place}", gives[start + place], atoms[start + place])


def permute(_: ChannelPropagation, call: Call) -> Labelled:
    """permute, transpose, swapaxes, movedim, t."""
    order = order_of(call)
    given = call.args[0]
    return Labelled(tuple(given.shape[axis] for axis in order), tuple(given.atoms[axis] for axis in order))


def concatenation(walk: ChannelPropagation, call: Call) -> Any:
    """cat: one behind the other along one dimension, the same along all others."""
    tensors = list(call.args[0])
    if not all(isinstance(each, Labelled) for each in tensors):
        return walk.keep(call)
    dimension = call.argument(1, "dim", 0) % len(call.gives)
    atoms = list(matched(walk, call, tensors, skip=dimension))
    along = [each.atoms[dimension] for each in tensors]
    if any(ids is not None for ids in along):
        parts = [
            _standing(walk, each.shape[dimension]) if ids is None else ids
            for each, ids in zip(tensors, along, strict=True)
        ]
        atoms[dimension] = np.concatenate(parts)
    return Labelled(tuple(call.gives), tuple(atoms))


def stacked(walk: ChannelPropagation, call: Call) -> Any:
    """stack: beside each other along a new dimension, the same along all others."""
    tensors = list(call.args[0])
    if not all(isinstance(each, Labelled) for each in tensors):
        return walk.keep(call)
    dimension = call.argument(1, "dim", 0) % len(call.gives)
    atoms = list(matched(walk, call, tensors))
    return Labelled(tuple(call.gives), (*atoms[:dimension], None, *atoms[dimension:]))


def _standing(walk: ChannelPropagation, size: int) -> Ids:
    ids = walk.atoms.new(size)
    walk.atoms.keep(ids, "they stand beside what cannot shrink")
    return ids


def matched(
    walk: ChannelPropagation, call: Call, tensors: Sequence[Labelled], skip: int | None = None
) -> Iterator[Ids | None]:
    """Dimension by dimension of tensors that are broadcast, last to last; a single place goes with everything."""
    rank = max(len(each.shape) for each in tensors)
    why = f"{call.node.name} ({call.name}) meets them with what cannot shrink"
    for axis in range(-rank, 0):
        seen = [(each.atoms[axis], each.shape[axis]) for each in tensors if len(each.shape) >= -axis]
        full = [ids for ids, size in seen if size > 1 or skip is not None]
        if rank + axis == skip or not full:
            yield None
            continue
        first = full[0]
        for ids in full[1:]:
            first = walk.atoms.match(first, ids, why)
        yield first


def padding(walk: ChannelPropagation, call: Call) -> Any:
    """pad: channels that are constant stand before and behind; they may go like any other."""
    given = call.args[0]
    amounts = list(call.args[1])
    mode = call.argument(2, "mode", "constant")
    atoms = list(given.atoms)
    for number in range(len(amounts) // 2):
        axis = len(atoms) - 1 - number
        ids, (before, behind) = atoms[axis], amounts[2 * number : 2 * number + 2]
        if ids is None or not (before or behind):
            continue
        if mode != "constant" or before < 0 or behind < 0:
            walk.atoms.keep(ids, f"{call.node.name} pads them")
            atoms[axis] = None
            continue
        new = walk.atoms.new(before), walk.atoms.new(behind)
        walk.literal(call, f"args.1.{2 * number}", before, new[0] if before else None)
        walk.literal(call, f"args.1.{2 * number + 1}", behind, new[1] if behind else None)
        atoms[axis] = np.concatenate([new[0], ids, new[1]])
    return Labelled(tuple(call.gives), tuple(atoms))


def expand(walk: ChannelPropagation, call: Call) -> Labelled:
    """Single places are repeated; every other dimension stays."""
    given = call.args[0]
    gives = tuple(call.gives)
    ahead = len(gives) - len(given.shape)
    atoms: Atoms = [*[None] * ahead, *given.atoms]
    if call.name == "expand":
        _sizes(walk, call, 1, gives, atoms)
    return Labelled(gives, tuple(atoms))


def repeat(_: ChannelPropagation, call: Call) -> Labelled:
    """Dimensions one after the other, again and again."""
    given, gives = call.args[0], tuple(call.gives)
    atoms: Atoms = [*[None] * (len(gives) - len(given.shape)), *given.atoms]
    tiles = [None if ids is None else np.tile(ids, size // len(ids)) for ids, size in zip(atoms, gives, strict=True)]
    return Labelled(gives, tuple(tiles))


def rolled(walk: ChannelPropagation, call: Call) -> Any:
    """roll, flip: along dimensions whose places all stay."""
    given = call.args[0]
    dimensions = call.argument(2 if call.name == "roll" else 1, "dims")
    if dimensions is None:
        return walk.keep(call)
    for axis in [dimensions] if isinstance(dimensions, int) else dimensions:
        walk.atoms.keep(given.atoms[axis], f"{call.node.name} moves them along")
    return given


def interleaved(walk: ChannelPropagation, call: Call) -> Any:
    """repeat_interleave: along a dimension whose places all stay."""
    given, dimension = call.args[0], call.argument(2, "dim")
    if dimension is None:
        return walk.keep(call)
    walk.atoms.keep(given.atoms[dimension], f"{call.node.name} repeats them")
    atoms = list(given.atoms)
    atoms[dimension] = None
    return Labelled(tuple(call.gives), tuple(atoms))


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "view",
            "reshape",
            "flatten",
            "unflatten",
            "squeeze",
            "unsqueeze",
            "Flatten",
            "Unflatten",
            "view_as",
            "reshape_as",
        ),
        reshape,
    ),
    **dict.fromkeys(("permute", "transpose", "swapaxes", "swapdims", "movedim", "t"), permute),
    **dict.fromkeys(("cat", "concat", "concatenate"), concatenation),
    **dict.fromkeys(("pad", "_pad"), padding),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expand),
    "repeat": repeat,
    "stack": stacked,
    "repeat_interleave": interleaved,
    **dict.fromkeys(("roll", "flip"), rolled),
}
