"""Channels that belong together, and their removal for real.

A channel that goes takes along every slice that produced it and every slice that read it: the filter, its bias and
its place in BatchNorm, the columns of the layers behind, and through additions the same of other layers; constants
that pad it, sizes that count it. Which those are is found on the captured graph (`graph/coupling`): the network runs
once, every place of every dimension gets an atom, and a rule for each operator says which atoms are the same. The
thought is that of Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, who follow layers; atoms follow
places, so that concatenation, shuffles, heads and padding need no special case.

Then half of everything is removed from a copy, and the copy is compared node by node with the network in which these
channels are silent. What differs stays whole, and the reason is said.

What is removed is remembered in `graph.meta["cuts"]`, plain values that `remove` replays on a fresh capture.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from tersor.core.errors import InputError
from tersor.core.evaluating import evaluating
from tersor.graph.coupling.groups import Cut, Sorted, Unit, sort
from tersor.graph.coupling.layers import rule_of
from tersor.graph.coupling.recording import record
from tersor.graph.coupling.trial import Trial
from tersor.graph.coupling.walk import Walk, walked
from tersor.graph.removal import merged, remove

__all__ = ["Cut", "Group", "coupled_channels", "merged", "remove"]


@dataclass(frozen=True)
class Group:
    """Channels that go together: channel c of the group is `slices[c]`, places in several layers.

    Attributes:
        root: the layer that produces them, by name.
        slices: for every channel, what goes with it. Where heads go, a head is a channel; where places of every head
            go, such a place is.
    """

    root: str
    slices: tuple[Unit, ...]

    def cuts(self, channels: Iterable[int]) -> list[Cut]:
        """What goes with `channels` of the group, one cut for each layer and axis."""
        return merged(cut for channel in channels for cut in self.slices[channel])


def coupled_channels(graph: fx.GraphModule, example: Tensor) -> tuple[list[Group], dict[str, str]]:
    """The groups of channels that can be removed, and of every other group's root why it stays whole.

    Heads come as one group, the places within a head as another: they lie in the same places of the same layers, and
    channels of both may go.

    Args:
        graph: a captured network without masks and grids; it comes back as it was.
        example: images (N, C, H, W) as the network wants them; the first is run, twice in one batch.

    Raises:
        InputError: the network does not run on the images.
    """
    example = example[:1].to(next(graph.parameters()).device).expand(2, *[-1] * (example.ndim - 1)).contiguous()
    groups: list[Group] = []
    whole: dict[str, str] = {}
    with evaluating(graph), torch.no_grad():
        try:
            recorded = record(graph, example)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise InputError(
                f"{type(graph).__name__} does not run on images {tuple(example.shape[1:])}: "
                f"{str(error).splitlines()[0]} Give images as the network wants them."
            ) from error
        seen: list[Group] = []
        for inner in (False, True):
            walk = walked(graph, recorded, rule_of, inner=inner)
            found, kept = sort(walk)
            new = [(each, Group(each.root, tuple(each.units))) for each in found]
            new = [(each, group) for each, group in new if group not in seen]
            seen += [group for _, group in new]
            left = _tried(walk, [each for each, _ in new], kept, example)
            groups += [group for each, group in new if each in left]
            whole = {**kept, **whole}
            if not walk.forked:
                break
    free = {group.root for group in groups}
    return groups, {root: why for root, why in whole.items() if root not in free}


def _tried(walk: Walk, groups: list[Sorted], whole: dict[str, str], example: Tensor) -> list[Sorted]:
    """The groups of which half can go at once; of the others, the reason is put into `whole`."""
    draw = random.Random(0)  # noqa: S311
    while groups:
        halves = {id(group): draw.sample(range(len(group.units)), len(group.units) // 2) for group in groups}
        units = [group.units[number] for group in groups for number in halves[id(group)]]
        gone = {group.roots[number] for group in groups for number in halves[id(group)]}
        trial = Trial(walk, gone)
        cut = _copied(walk.graph)
        remove(cut, merged(each for unit in units for each in unit))
        found = trial.difference(cut, example)
        if found is None:
            return groups
        node, why = found
        guilty = trial.guilty(node)
        left = [group for group in groups if guilty.isdisjoint(group.roots)]
        left = left if len(left) < len(groups) else []
        whole.update((group.root, why) for group in groups if group not in left)
        groups = left
    return groups


def _copied(graph: fx.GraphModule) -> fx.GraphModule:
    """With parameters of its own over the same numbers, which removal leaves alone."""
    shared = {id(each): nn.Parameter(each.detach(), each.requires_grad) for each in graph.parameters()}
    shared |= {id(each): each.detach() for each in graph.buffers()}
    return copy.deepcopy(graph, shared)
