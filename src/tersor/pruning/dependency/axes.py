"""Which dimension becomes which."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from tersor.pruning.dependency.propagation import Call


def blocks(read: Sequence[int], made: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The dimensions on both sides that hold the same places, as few at a time as can be; those of size 1 left out."""
    left = [axis for axis, size in enumerate(read) if size != 1]
    right = [axis for axis, size in enumerate(made) if size != 1]
    while left and right:
        block = [left.pop(0)], [right.pop(0)]
        while (inside := math.prod(read[axis] for axis in block[0])) != (
            outside := math.prod(made[axis] for axis in block[1])
        ):
            if inside < outside:
                block[0].append(left.pop(0))
            else:
                block[1].append(right.pop(0))
        yield block


def order_of(call: Call) -> list[int]:
    """The old dimension for every new one: of permute, transpose, swapaxes, movedim, t."""
    rank = len(call.args[0].shape)
    options = call.args[1:]
    if call.name == "permute":
        order = options or (call.kwargs["dims"],)
        return [axis % rank for axis in (order[0] if isinstance(order[0], tuple | list) else order)]
    order = list(range(rank))
    if call.name == "t":
        return order[::-1]
    first, second = (axis % rank for axis in [*options, *call.kwargs.values()])
    if call.name == "movedim":
        order.insert(second, order.pop(first))
    else:
        order[first], order[second] = order[second], order[first]
    return order
