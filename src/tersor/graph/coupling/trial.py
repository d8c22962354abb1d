"""Whether a network whose channels were removed computes what it computed with these channels silent, node by node."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.func import functional_call

from tersor.graph.coupling.atoms import Labelled
from tersor.graph.coupling.recording import computed, last_readers
from tersor.graph.coupling.walk import Walk, flat

_TOLERANCE = 1e-4

Mask = NDArray[np.bool_]


class Trial:
    """A walk, and what is to be silent in it.

    Args:
        walk: of the network as it was.
        gone: roots of the atoms that were removed.
    """

    def __init__(self, walk: Walk, gone: set[int]) -> None:
        self.walk = walk
        self.gone = gone

    def difference(self, cut: fx.GraphModule, example: Tensor) -> tuple[fx.Node, str] | None:
        """The first node of the network as it was that `cut` gives otherwise, and what happened there."""
        whole = self.walk.graph
        before: dict[fx.Node, Any] = {}
        after: dict[fx.Node, Any] = {}
        last = last_readers(whole)
        partner = dict(zip(whole.graph.nodes, cut.graph.nodes, strict=True))
        for node, other in partner.items():
            if node.op == "placeholder":
                before[node] = after[other] = example
                continue
            try:
                after[other] = computed(cut, other, after)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                return node, f"without some of them {node.name} cannot run: {str(error).splitlines()[0]}"
            value = self._alone(cut, node, other, before) if node in self.walk.across else None
            value = self._computed(node, before) if value is None else value
            before[node], problem = self._compared(value, after[other], self.walk.values[node])
            if problem:
                return node, f"without some of them {node.name} gives other values than with these at zero"
            for read in last.get(node, ()):
                del before[read]
                after.pop(partner[read], None)
        return None

    def _compared(self, value: Any, other: Any, labels: Any) -> tuple[Any, bool]:
        """`value`, silent where channels are gone, and whether what is left differs from `other`."""
        if isinstance(value, tuple | list) and isinstance(labels, tuple | list) and isinstance(other, tuple | list):
            found = [self._compared(*each) for each in zip(value, other, labels, strict=True)]
            plain = [each for each, _ in found]
            return (tuple(plain) if isinstance(value, tuple) else plain), any(problem for _, problem in found)
        if not isinstance(value, Tensor) or not isinstance(labels, Labelled):
            return value, False
        left = self._left(value, labels)
        if left.shape != other.shape or not _close(other, left):
            return value, True
        return self._silent(value, labels), False

    def _computed(self, node: fx.Node, before: dict[fx.Node, Any]) -> Any:
        """What the whole network gives; of an attention that is one node, what it sums up within is silent too."""
        module = self.walk.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, nn.MultiheadAttention):
            return computed(self.walk.graph, node, before)
        weight = module.out_proj.weight
        labels = Labelled(tuple(weight.shape), (None, self.walk.places.get((f"{node.target}.out_proj", "in"))))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda read: before[read])
        silent = {"out_proj.weight": self._silent(weight, labels)}
        return functional_call(module, silent, tuple(args), dict(kwargs))

    def _alone(self, cut: fx.GraphModule, node: fx.Node, other: fx.Node, before: dict[fx.Node, Any]) -> Any:
        """A normalisation over the channels that stay, laid between silent ones."""
        labels = self.walk.values[node]
        stays = list(self._stays(labels))
        if not stays:
            return None
        read = {each: self._left(before[each], self.walk.values[each]) for each in node.all_input_nodes}
        partner = dict(zip(node.all_input_nodes, other.all_input_nodes, strict=True))
        given = computed(cut, other, {partner[each]: value for each, value in read.items()})
        full = torch.zeros(labels.shape, dtype=given.dtype, device=given.device)
        return full.index_copy(stays[0][0], _numbers(stays[0][1], given), given) if len(stays) == 1 else None

    def _stays(self, labels: Labelled) -> Iterator[tuple[int, Mask]]:
        """Every dimension of which something is gone, and which of its places stay."""
        for axis, atoms in enumerate(labels.atoms):
            if atoms is not None:
                stay = np.fromiter((root not in self.gone for root in self.walk.atoms.each_root(atoms)), bool, len(atoms))
                if not stay.all():
                    yield axis, stay

    def _left(self, value: Any, labels: Any) -> Any:
        if isinstance(labels, Labelled):
            for axis, stay in self._stays(labels):
                value = value.index_select(axis, _numbers(stay, value))
        return value

    def _silent(self, value: Tensor, labels: Labelled) -> Tensor:
        for axis, stay in self._stays(labels):
            value = value.index_fill(axis, _numbers(~stay, value), 0)
        return value

    def guilty(self, node: fx.Node) -> set[int]:
        """Roots of what is gone from `node` and from what it reads."""
        labels = flat([self.walk.values[each] for each in (node, *node.all_input_nodes)])
        return {
            root
            for each in labels
            for atoms in each.atoms
            if atoms is not None
            for root in self.walk.atoms.roots(atoms).tolist()
        } & self.gone


def _close(found: Tensor, expected: Tensor) -> bool:
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    if not expected.numel():
        return True
    return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _numbers(mask: Mask, beside: Tensor) -> Tensor:
    return torch.from_numpy(mask.nonzero()[0]).to(beside.device)
