"""Channels that belong together, and their removal for real.

A channel that goes takes along every slice that produced it and every slice that read it: the filter, its bias and
its place in BatchNorm, the columns of the layers behind, and through additions the same of other layers; constants
that pad it, sizes that count it. Which those are is found on the captured graph (`graph/coupling`): the network runs
once, every place of every dimension gets an atom, and a rule for each operator says which atoms are the same. The
thought is that of Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, who follow layers; atoms follow
places, so that concatenation, shuffles, heads and padding need no special case.

Then half of everything is removed from a copy, and the copy is compared node by node with the network in which these
channels are silent. What differs stays whole, and the reason is said.

What is removed is remembered in `graph.meta["cuts"]`, rounds of plain values, which `remove` replays in turn on a fresh
capture: the places of a round are those of the network that the rounds before it left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tersor.graph.eval_mode import checked_forward, evaluating
from tersor.pruning.channel_removal import merged, remove
from tersor.pruning.dependency.groups import Cut, Unit
from tersor.pruning.dependency.layer_rules import rule_of
from tersor.pruning.dependency.propagation import ChannelPropagation, Place, walked
from tersor.pruning.dependency.removal_check import Trial
from tersor.pruning.dependency.search import Plan, copied
from tersor.pruning.dependency.shape_recording import Recorded, record
from tersor.pruning.garbage import collecting_what_is_new

__all__ = ["Cut", "Group", "copied", "coupled_channels", "difference", "merged", "remove"]


@dataclass(frozen=True)
class Group:
    """Channels that go together: channel c of the group is `slices[c]`, places in several layers.

    Attributes:
        root: the layer that produces them, by name.
        slices: for every channel, what goes with it. Where heads go, a head is a channel; where places of every head
            go, such a place is.
        within: whether its channels are places of every head, and lie across the heads of another group.
    """

    root: str
    slices: tuple[Unit, ...]
    within: bool = False

    @property
    def width(self) -> int:
        """How many places of its root one channel is: those of a head, of a group of a convolution."""
        return 1 if self.within else max(len(cut.channels) for cut in self.slices[0] if cut.layer == self.root)

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
    example = twice(graph, example)
    with evaluating(graph), torch.no_grad(), collecting_what_is_new():
        recorded = run(graph, example)
        plan = Plan(example[:1])
        for inner in (False, True):
            walk = walked(graph, recorded, rule_of, inner=inner)
            if walk.mixed:  # atoms lie in all images of a batch, so that it is as large as on the recorded run
                plan.example = example
            plan.add(walk)
            if not walk.forked:
                break
        groups = [Group(each.root, tuple(each.units), walk.inner) for walk, found in plan.sides for each in found]
    free = {group.root for group in groups}
    return groups, {root: why for root, why in plan.whole.items() if root not in free}


def twice(graph: fx.GraphModule, example: Tensor) -> Tensor:
    """The first image, two times in a batch: of one image alone values may be as large as parameters."""
    return example[:1].to(next(graph.parameters()).device).expand(2, *[-1] * (example.ndim - 1)).contiguous()


def run(graph: fx.GraphModule, example: Tensor) -> Recorded:
    """What every node gives.

    Raises:
        InputError: the network does not run on the images.
    """
    with checked_forward(type(graph).__name__, example, captured=True):
        return record(graph, example)


def difference(graph: fx.GraphModule, cuts: Sequence[Cut], example: Tensor) -> str:
    """What the network without these channels computes otherwise than with them silent; nothing where they agree.

    Args:
        graph: a captured network, whole; it comes back as it was.
        cuts: what `remove` would take.
        example: images (N, C, H, W), two of them at least.
    """
    places = {(cut.layer, cut.axis): set(cut.channels) for cut in cuts if "=" not in cut.axis}
    with evaluating(graph), torch.no_grad():
        recorded = record(graph, example)
        walks = [walked(graph, recorded, rule_of, inner=inner) for inner in (False, True)]
        cut = copied(graph)
        remove(cut, cuts)
        found = Trial([(walk, _gone(walk, places)) for walk in walks]).difference(cut, example)
    return found[1] if found else ""


def _gone(walk: ChannelPropagation, places: dict[Place, set[int]]) -> set[int]:
    """Roots of the atoms that lie in `places` alone."""
    inside: set[int] = set()
    outside: set[int] = set()
    for place, atoms in walk.places.items():
        if atoms is not None and "=" not in place[1]:
            for number, root in enumerate(walk.atoms.roots(atoms).tolist()):
                (inside if number in places.get(place, ()) else outside).add(root)
    return inside - outside
