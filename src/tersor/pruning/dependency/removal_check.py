"""Verification of a removal: every node of the pruned network equals that of the network with the channels at zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from tersor.data.network_inputs import NetworkInput
from tersor.pruning.dependency.propagation import ChannelPropagation, tensors_in
from tersor.pruning.dependency.shape_recording import run_node, user_to_last_uses
from tersor.pruning.dependency.union_find import TrackedShape

_TOLERANCE = 1e-4

Remaining = list[tuple[int, NDArray[np.bool_]]]
"""Every axis of a tensor along which something is removed, and a mask of what remains."""


class RemovalCheck:
    """Compares a pruned network with the original whose removed channels are zero.

    Args:
        removed: propagations of one network, each with the representatives of the removed channel sets.
    """

    def __init__(self, removed: Sequence[tuple[ChannelPropagation, set[int]]]) -> None:
        self.removed = removed
        self._remaining = [propagation.sets.outside(sets) for propagation, sets in removed]
        self.graph = removed[0][0].graph
        self.cross_channel = set[fx.Node]().union(*(propagation.cross_channel for propagation, _ in removed))

    def first_difference(self, pruned: fx.GraphModule, example: NetworkInput) -> tuple[fx.Node, str] | None:
        """The first node of the original whose output differs in `pruned`, and the reason; None if all agree."""
        before: dict[fx.Node, Any] = {}
        after: dict[fx.Node, Any] = {}
        remaining: dict[fx.Node, Any] = {}
        last_uses = user_to_last_uses(self.graph)
        partner = dict(zip(self.graph.graph.nodes, pruned.graph.nodes, strict=True))
        for node, other in partner.items():
            remaining[node] = self._remaining_of([propagation.values[node] for propagation, _ in self.removed])
            try:
                after[other] = run_node(pruned, other, after, example)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                return node, f"{node.name} fails if some of them are removed: {str(error).splitlines()[0]}"
            if node.op == "placeholder":
                before[node] = after[other]
                continue
            if node in self.cross_channel:
                inputs = {partner[read]: _select(before[read], remaining[read]) for read in node.all_input_nodes}
                normalized = run_node(pruned, other, inputs)
                before[node] = _scatter(normalized, remaining[node], self.removed[0][0].values[node])
            else:
                before[node] = _zero_removed(run_node(self.graph, node, before), remaining[node])
            if not _allclose(_select(before[node], remaining[node]), after[other]):
                effect = f"does not have the same effect on the output of {node.name} as setting them to zero"
                return node, f"removing some of them {effect}"
            for read in last_uses.get(node, ()):
                del before[read]
                after.pop(partner[read], None)
        return None

    def removed_at(self, node: fx.Node) -> list[set[int]]:
        """For every propagation, the removed sets in the output and the inputs of `node`."""
        at_node: list[set[int]] = []
        for propagation, removed in self.removed:
            tensors = tensors_in([propagation.values[each] for each in (node, *node.all_input_nodes)])
            axes = [ids for tensor in tensors for ids in tensor.ids if ids is not None]
            at_node.append({each for ids in axes for each in propagation.sets.find_all(ids).tolist()} & removed)
        return at_node

    def _remaining_of(self, values: Sequence[Any]) -> Any:
        """`Remaining` for every tensor of a value, given the value's ids in each propagation."""
        if isinstance(values[0], tuple | list):
            return [self._remaining_of(each) for each in zip(*values, strict=True)]
        if not isinstance(values[0], TrackedShape):
            return None
        remaining: Remaining = []
        for axis, size in enumerate(values[0].shape):
            mask = np.ones(size, bool)
            for of_ids, value in zip(self._remaining, values, strict=True):
                ids = value.ids[axis]
                if ids is not None:
                    mask &= of_ids[ids]
            if not mask.all():
                remaining.append((axis, mask))
        return remaining


def _scatter(value: Tensor, remaining: Remaining, tracked: TrackedShape) -> Tensor:
    """The original's shape, with zeros where something was removed."""
    for axis, mask in remaining:
        sizes = [*value.shape[:axis], tracked.shape[axis], *value.shape[axis + 1 :]]
        value = value.new_zeros(sizes).index_copy(axis, _indices(mask, value), value)
    return value


def _select(value: Any, remaining: Any) -> Any:
    """`value` without the removed channels."""
    if isinstance(value, Tensor):
        for axis, mask in remaining or ():
            value = value.index_select(axis, _indices(mask, value))
        return value
    if isinstance(value, tuple | list) and isinstance(remaining, list):
        return [_select(*each) for each in zip(value, remaining, strict=True)]
    return value


def _zero_removed(value: Any, remaining: Any) -> Any:
    """`value` with zeros where something is removed."""
    if isinstance(value, Tensor):
        for axis, mask in remaining or ():
            value = value.index_fill(axis, _indices(~mask, value), 0)
        return value
    if isinstance(value, tuple | list) and isinstance(remaining, list) and any(remaining):
        return tuple(_zero_removed(*each) for each in zip(value, remaining, strict=True))
    return value


def _indices(mask: NDArray[np.bool_], like: Tensor) -> Tensor:
    return torch.from_numpy(mask.nonzero()[0]).to(like.device)


def _allclose(expected: Any, actual: Any) -> bool:
    if isinstance(expected, Tensor) and isinstance(actual, Tensor):
        if expected.shape != actual.shape:
            return False
        if not expected.is_floating_point():
            return torch.equal(actual, expected)
        if not expected.numel():
            return True
        differs = (actual - expected).abs()[actual != expected]  # equal infinities, as in masks of attention, are none
        largest = expected[expected.isfinite()].abs()
        return not differs.numel() or bool(differs.max() <= _TOLERANCE * (largest.max() if largest.numel() else 0))
    if isinstance(expected, list) and isinstance(actual, tuple | list):
        return all(_allclose(*each) for each in zip(expected, actual, strict=True))
    return True
