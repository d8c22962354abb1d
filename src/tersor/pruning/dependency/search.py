"""Which groups can be removed together: half of every group is removed on trial, groups that fail are left out."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from tersor.data.network_inputs import NetworkInput
from tersor.pruning.channel_removal import merge_cuts, remove
from tersor.pruning.dependency.groups import ChannelGroup, CoupledSlices, Cut, find_groups
from tersor.pruning.dependency.propagation import ChannelPropagation
from tersor.pruning.dependency.removal_check import RemovalCheck


class GroupSearch:
    """The groups that can be removed at once, and why the others cannot.

    Args:
        example: images for the trial runs.

    Attributes:
        groups: those of each propagation.
        unprunable: root -> why its channels cannot be removed.
    """

    def __init__(self, example: NetworkInput) -> None:
        self.example = example
        self.groups: list[tuple[ChannelPropagation, list[ChannelGroup]]] = []
        self.unprunable: dict[str, str] = {}
        self._known: list[list[set[Cut]]] = []

    def add(self, propagation: ChannelPropagation) -> None:
        """Add the groups of a propagation that no earlier one has; leave out those that fail the trial."""
        groups, unprunable = find_groups(propagation)
        groups = [each for each in groups if not (propagation.inner and _without_arguments(each) in self._known)]
        if propagation.ambiguous_split:
            self._known += [_without_arguments(each) for each in groups]
        self.unprunable = {**unprunable, **self.unprunable}
        self.groups.append((propagation, groups))
        while self.groups[-1][1]:
            failure = self._try_half()
            if failure is None:
                return
            failed, reason = failure
            self.groups[-1] = (propagation, [each for each in self.groups[-1][1] if each not in failed])
            self.unprunable.update((each.root, reason) for each in failed)

    def _try_half(self) -> tuple[list[ChannelGroup], str] | None:
        """Remove half of every group; return those groups of the last propagation that fail, and the reason."""
        draw = random.Random(0)  # noqa: S311
        removed: list[set[int]] = []
        slices: dict[int, list[CoupledSlices]] = {}
        for _, groups in self.groups:
            halves = [(each, draw.sample(range(len(each.slices)), len(each.slices) // 2)) for each in groups]
            removed.append({each.representatives[number] for each, half in halves for number in half})
            slices |= {id(each): [each.slices[number] for number in half] for each, half in halves}
        check = RemovalCheck([(each, sets) for (each, _), sets in zip(self.groups, removed, strict=True)])
        last = self.groups[-1][1]
        pruned = _pruned_copy(check.graph, [each for half in slices.values() for each in half])
        if pruned is None:
            failed = [each for each in last if _pruned_copy(check.graph, slices[id(each)]) is None]
            return failed or last, "a tensor with these channels cannot be sliced"
        difference = check.first_difference(pruned, self.example)
        if difference is None:
            return None
        node, reason = difference
        sets = check.removed_at(node)[-1]
        return [each for each in last if not sets.isdisjoint(each.representatives)] or last, reason


def _pruned_copy(graph: fx.GraphModule, slices: Sequence[CoupledSlices]) -> fx.GraphModule | None:
    """A copy without these slices, or None where they cannot be removed."""
    pruned = copy_graph(graph)
    try:
        remove(pruned, merge_cuts(cut for each in slices for cut in each))
    except (AssertionError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError):
        return None
    return pruned


def _without_arguments(group: ChannelGroup) -> list[set[Cut]]:
    """The slices without the arguments that count them."""
    return [{cut for cut in each if "=" not in cut.axis} for each in group.slices]


def copy_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy with Parameters of its own that share the storage; removal leaves the original unchanged."""
    shared: dict[int, Any] = {id(each): nn.Parameter(each.detach(), each.requires_grad) for each in graph.parameters()}
    shared |= {id(each): each.detach() for each in graph.buffers()}
    # layers without children are copied by hand: deepcopy visits a dozen empty dicts in each
    shared |= {
        id(each): _copy_layer(each, shared) for each in graph.modules() if each is not graph and not [*each.children()]
    }
    return copy.deepcopy(graph, shared)


def _copy_layer(layer: nn.Module, tensors: dict[int, Any]) -> nn.Module:
    copied = copy.copy(layer)
    own = {name: each.copy() for name, each in vars(layer).items() if isinstance(each, dict)}
    for kind in ("_parameters", "_buffers"):
        own[kind] = {name: tensors.get(id(each), each) for name, each in own[kind].items()}
    vars(copied).update(own)
    return copied
