"""What can go at once: groups are tried together, half of everything; what fails is left out until nothing does."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from tersor.pruning.channel_removal import merged, remove
from tersor.pruning.dependency.groups import Cut, Sorted, Unit, sort
from tersor.pruning.dependency.propagation import ChannelPropagation
from tersor.pruning.dependency.removal_check import Trial


class Plan:
    """What can go at once, and why the rest cannot.

    Args:
        example: images to try it on.
    """

    def __init__(self, example: Tensor) -> None:
        self.example = example
        self.sides: list[tuple[ChannelPropagation, list[Sorted]]] = []
        self.whole: dict[str, str] = {}
        self._seen: list[list[set[Cut]]] = []

    def add(self, walk: ChannelPropagation) -> None:
        """Adds the groups of a walk that were not seen in an earlier one; those that fail are left out."""
        found, kept = sort(walk)
        groups = [each for each in found if not (walk.inner and _weights(each) in self._seen)]
        if walk.forked:
            self._seen += [_weights(each) for each in groups]
        self.whole = {**kept, **self.whole}
        self.sides.append((walk, groups))
        while self.sides[-1][1]:
            failed = self._failed()
            if failed is None:
                return
            guilty, why = failed
            self.sides[-1] = (walk, [each for each in self.sides[-1][1] if each not in guilty])
            self.whole.update((each.root, why) for each in guilty)

    def _failed(self) -> tuple[list[Sorted], str] | None:
        """Those of the last walk's groups that have to stay, where half of everything is removed."""
        draw = random.Random(0)  # noqa: S311
        gone: list[set[int]] = []
        units: dict[int, list[Unit]] = {}
        for _, groups in self.sides:
            halves = [(each, draw.sample(range(len(each.units)), len(each.units) // 2)) for each in groups]
            gone.append({each.roots[number] for each, half in halves for number in half})
            units |= {id(each): [each.units[number] for number in half] for each, half in halves}
        trial = Trial([(walk, roots) for (walk, _), roots in zip(self.sides, gone, strict=True)])
        last = self.sides[-1][1]
        cut = _without(trial.graph, [unit for some in units.values() for unit in some])
        if cut is None:
            guilty = [each for each in last if _without(trial.graph, units[id(each)]) is None]
            return guilty or last, "their places cannot be taken out of all that holds them"
        found = trial.difference(cut, self.example)
        if found is None:
            return None
        node, why = found
        roots = trial.guilty(node)[-1]
        return [each for each in last if not roots.isdisjoint(each.roots)] or last, why


def _without(graph: fx.GraphModule, units: Sequence[Unit]) -> fx.GraphModule | None:
    """A copy without these, or None where they cannot be taken out."""
    cut = copied(graph)
    try:
        remove(cut, merged(each for unit in units for each in unit))
    except (AssertionError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError):
        return None
    return cut


def _weights(group: Sorted) -> list[set[Cut]]:
    """The units without the arguments that count them."""
    return [{cut for cut in unit if "=" not in cut.axis} for unit in group.units]


def copied(graph: fx.GraphModule) -> fx.GraphModule:
    """With parameters of its own over the same numbers, which removal leaves alone."""
    shared: dict[int, Any] = {id(each): nn.Parameter(each.detach(), each.requires_grad) for each in graph.parameters()}
    shared |= {id(each): each.detach() for each in graph.buffers()}
    # in a layer there is nothing deeper to copy, and deepcopy looks for it in a dozen empty dicts
    shared |= {
        id(each): _twin(each, shared) for each in graph.modules() if each is not graph and not [*each.children()]
    }
    return copy.deepcopy(graph, shared)


def _twin(layer: nn.Module, tensors: dict[int, Any]) -> nn.Module:
    twin = copy.copy(layer)
    own = {name: each.copy() for name, each in vars(layer).items() if isinstance(each, dict)}
    for kind in ("_parameters", "_buffers"):
        own[kind] = {name: tensors.get(id(each), each) for name, each in own[kind].items()}
    vars(twin).update(own)
    return twin
