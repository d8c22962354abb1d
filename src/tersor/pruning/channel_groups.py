"""Groups of coupled channels (DepGraph), and whether their removal leaves the network's function unchanged.

A channel is removed together with every slice that produces or consumes it: the filter, its bias and BatchNorm entry,
the columns of the following layers, the same slices of layers that are coupled by an addition, constants that pad it,
and arguments that count it. The captured graph determines which (`pruning/dependency`): the network runs once, every
index of every dimension gets an id, and a rule for each operator couples ids. Fang et al., "DepGraph: Towards Any
Structural Pruning", CVPR 2023, couple layers; coupling single indices needs no special case for concatenation,
shuffles, heads and padding.

Then half of every group is removed from a copy, and the copy is compared node by node with the network whose removed
channels are zero. Groups that differ are not removed, and the reason is reported.

`graph.meta["cuts"]` records removals as rounds of plain values. `remove` replays them in order on a fresh capture: the
indices of a round are those of the network after the rounds before it.
"""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import fx

from tersor.data.network_inputs import NetworkInput
from tersor.graph.eval_mode import checked_forward, evaluating
from tersor.pruning.channel_removal import merge_cuts, remove
from tersor.pruning.dependency.groups import CoupledSlices, Cut
from tersor.pruning.dependency.layer_rules import rule_of
from tersor.pruning.dependency.propagation import ChannelPropagation, PrunableAxis, propagate
from tersor.pruning.dependency.removal_check import RemovalCheck
from tersor.pruning.dependency.search import GroupSearch, copy_graph
from tersor.pruning.dependency.shape_recording import Recorded, record

__all__ = ["Cut", "Group", "copy_graph", "coupled_channels", "merge_cuts", "removal_difference", "remove"]


@dataclass(frozen=True)
class Group:
    """Channels that can be removed one by one, each with all of its slices.

    Attributes:
        root: the layer that produces them, by name.
        slices: what is removed with each channel. Heads and positions within heads are channels, too.
        within_heads: whether a channel is a position within every head.
    """

    root: str
    slices: tuple[CoupledSlices, ...]
    within_heads: bool = False

    @property
    def width(self) -> int:
        """Number of output channels of the root in one channel of the group.

        It is 1, or the channels of a head or of a group of a convolution that are removed together.
        """
        return 1 if self.within_heads else max(len(cut.channels) for cut in self.slices[0] if cut.layer == self.root)

    def cuts(self, channels: Iterable[int]) -> list[Cut]:
        """What is removed with `channels`, one cut for each layer and axis."""
        return merge_cuts(cut for channel in channels for cut in self.slices[channel])


def coupled_channels(graph: fx.GraphModule, example: NetworkInput) -> tuple[list[Group], dict[str, str]]:
    """Find the groups of channels that can be removed; root -> reason for all others.

    Heads form one group, the positions within heads another: they overlap, and channels of both can be removed.

    Args:
        graph: a captured network without masks and quantizers; unchanged afterwards.
        example: normalized images (N, C, H, W); the first one is run, twice in one batch.

    Raises:
        InputError: the network does not run on the images.
    """
    example = two_images(graph, example)
    with evaluating(graph), torch.no_grad(), _existing_objects_not_collected():
        recorded = record_run(graph, example)
        search = GroupSearch(example[:1])
        for inner in (False, True):
            propagation = propagate(graph, recorded, rule_of, inner=inner)
            if propagation.mixes_batch:  # ids span all images of a batch, which has to be as large as when recorded
                search.example = example
            search.add(propagation)
            if not propagation.ambiguous_split:
                break
        groups = [
            Group(each.root, tuple(each.slices), propagation.inner)
            for propagation, found in search.groups
            for each in found
        ]
    prunable = {group.root for group in groups}
    return groups, {root: reason for root, reason in search.unprunable.items() if root not in prunable}


@contextmanager
def _existing_objects_not_collected() -> Generator[None]:
    """Context in which the garbage collector skips existing objects, such as those of torch."""
    if gc.get_freeze_count():  # frozen by the caller
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def two_images(graph: fx.GraphModule, example: NetworkInput) -> NetworkInput:
    """The first image, twice in a batch: with a batch size of 1, activations may have the shape of parameters."""
    return example[[0, 0]].to(next(graph.parameters()).device)


def record_run(graph: fx.GraphModule, example: NetworkInput) -> Recorded:
    """The shape of every value.

    Raises:
        InputError: the network does not run on the images.
    """
    with checked_forward(type(graph).__name__, example, captured=True):
        return record(graph, example)


def removal_difference(graph: fx.GraphModule, cuts: Sequence[Cut], example: NetworkInput) -> str:
    """The first difference from the network whose removed channels are set to zero; "" if there is none.

    Args:
        graph: a captured, unpruned network; unchanged afterwards.
        cuts: what `remove` takes.
        example: images (N, C, H, W), N >= 2.
    """
    removed = {(cut.layer, cut.axis): set(cut.channels) for cut in cuts if "=" not in cut.axis}
    with evaluating(graph), torch.no_grad():
        recorded = record(graph, example)
        propagations = [propagate(graph, recorded, rule_of, inner=inner) for inner in (False, True)]
        pruned = copy_graph(graph)
        remove(pruned, cuts)
        check = RemovalCheck([(each, _removed_sets(each, removed)) for each in propagations])
        difference = check.first_difference(pruned, example)
    return difference[1] if difference else ""


def _removed_sets(propagation: ChannelPropagation, removed: dict[PrunableAxis, set[int]]) -> set[int]:
    """Representatives of the channel sets of which everything is removed."""
    inside: set[int] = set()
    outside: set[int] = set()
    for axis, ids in propagation.axes.items():
        if ids is not None and "=" not in axis[1]:
            for index, representative in enumerate(propagation.sets.find_all(ids).tolist()):
                (inside if index in removed.get(axis, ()) else outside).add(representative)
    return inside - outside
