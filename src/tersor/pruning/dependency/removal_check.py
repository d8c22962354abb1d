"""Whether a network whose channels were removed computes what it computed with these channels silent, node by node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.func import functional_call

from tersor.pruning.dependency.propagation import ChannelPropagation, flat
from tersor.pruning.dependency.shape_recording import computed, given, last_readers
from tersor.pruning.dependency.union_find import Labelled

_TOLERANCE = 1e-4

Stay = list[tuple[int, NDArray[np.bool_]]]
"""Every dimension of a tensor of which something is gone, and which of its places stay."""


class Trial:
    """Walks along one network, and what is to be silent in it.

    Args:
        sides: each a walk, and roots of the atoms that were removed.
    """

    def __init__(self, sides: Sequence[tuple[ChannelPropagation, set[int]]]) -> None:
        self.sides = sides
        self._stay = [walk.atoms.outside(gone) for walk, gone in sides]
        self.graph = sides[0][0].graph
        self.across = set[fx.Node]().union(*(walk.across for walk, _ in sides))

    def difference(self, cut: fx.GraphModule, example: Tensor) -> tuple[fx.Node, str] | None:
        """The first node of the network as it was that `cut` gives otherwise, and what happened there."""
        before: dict[fx.Node, Any] = {}
        after: dict[fx.Node, Any] = {}
        stays: dict[fx.Node, Any] = {}
        last = last_readers(self.graph)
        partner = dict(zip(self.graph.graph.nodes, cut.graph.nodes, strict=True))
        for node, other in partner.items():
            stays[node] = self._stays([walk.values[node] for walk, _ in self.sides])
            if node.op == "placeholder":
                before[node] = after[other] = given(node, example)
                continue
            try:
                after[other] = computed(cut, other, after)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                return node, f"without some of them {node.name} cannot run: {str(error).splitlines()[0]}"
            if node in self.across:
                value = _alone(
                    cut, other, {partner[read]: (before[read], stays[read]) for read in node.all_input_nodes}
                )
                before[node] = _laid(value, stays[node], self.sides[0][0].values[node])
            else:
                before[node] = _silent(self._computed(node, before), stays[node])
            if not _same(_left(before[node], stays[node]), after[other]):
                return node, f"without some of them {node.name} gives other values than with these at zero"
            for read in last.get(node, ()):
                del before[read]
                after.pop(partner[read], None)
        return None

    def guilty(self, node: fx.Node) -> list[set[int]]:
        """For every side, roots of what is gone from `node` and from what it reads."""
        found: list[set[int]] = []
        for walk, gone in self.sides:
            labels = flat([walk.values[each] for each in (node, *node.all_input_nodes)])
            atoms = [ids for each in labels for ids in each.atoms if ids is not None]
            found.append({root for ids in atoms for root in walk.atoms.roots(ids).tolist()} & gone)
        return found

    def _computed(self, node: fx.Node, before: dict[fx.Node, Any]) -> Any:
        """What the whole network gives; of an attention that is one node, what it sums up within is silent too."""
        module = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, nn.MultiheadAttention):
            return computed(self.graph, node, before)
        weight = module.out_proj.weight
        summed = [walk.places.get((f"{node.target}.out_proj", "in")) for walk, _ in self.sides]
        stay = self._stays([Labelled(tuple(weight.shape), (None, atoms)) for atoms in summed])
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda read: before[read])
        return functional_call(module, {"out_proj.weight": _silent(weight, stay)}, tuple(args), dict(kwargs))

    def _stays(self, values: Sequence[Any]) -> Any:
        """What is left of a value that every side has labelled: `Stay` in the place of its tensors."""
        if isinstance(values[0], tuple | list):
            return [self._stays(each) for each in zip(*values, strict=True)]
        if not isinstance(values[0], Labelled):
            return None
        found: Stay = []
        for axis, size in enumerate(values[0].shape):
            stay = np.ones(size, bool)
            for stays, value in zip(self._stay, values, strict=True):
                atoms = value.atoms[axis]
                if atoms is not None:
                    stay &= stays[atoms]
            if not stay.all():
                found.append((axis, stay))
        return found


def _alone(cut: fx.GraphModule, node: fx.Node, read: dict[fx.Node, tuple[Any, Any]]) -> Tensor:
    """A normalisation over the channels that stay."""
    return computed(cut, node, {each: _left(value, stay) for each, (value, stay) in read.items()})


def _laid(value: Tensor, stay: Stay, labels: Labelled) -> Tensor:
    """What was computed of the channels that stay, between silent ones."""
    for axis, places in stay:
        sizes = [*value.shape[:axis], labels.shape[axis], *value.shape[axis + 1 :]]
        value = value.new_zeros(sizes).index_copy(axis, _numbers(places, value), value)
    return value


def _left(value: Any, stay: Any) -> Any:
    """`value` without what is gone."""
    if isinstance(value, Tensor):
        for axis, places in stay or ():
            value = value.index_select(axis, _numbers(places, value))
        return value
    if isinstance(value, tuple | list) and isinstance(stay, list):
        return [_left(*each) for each in zip(value, stay, strict=True)]
    return value


def _silent(value: Any, stay: Any) -> Any:
    """`value` with zeros where something is gone."""
    if isinstance(value, Tensor):
        for axis, places in stay or ():
            value = value.index_fill(axis, _numbers(~places, value), 0)
        return value
    if isinstance(value, tuple | list) and isinstance(stay, list) and any(stay):
        return tuple(_silent(*each) for each in zip(value, stay, strict=True))
    return value


def _numbers(mask: NDArray[np.bool_], beside: Tensor) -> Tensor:
    return torch.from_numpy(mask.nonzero()[0]).to(beside.device)


def _same(expected: Any, found: Any) -> bool:
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        if expected.shape != found.shape:
            return False
        if not expected.is_floating_point():
            return torch.equal(found, expected)
        if not expected.numel():
            return True
        return bool((found - expected).abs_().max() <= _TOLERANCE * expected.abs().max())
    if isinstance(expected, list) and isinstance(found, tuple | list):
        return all(_same(*each) for each in zip(expected, found, strict=True))
    return True
