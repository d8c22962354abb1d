"""What a removed channel gave on average goes on being given, by the biases of the layers that read it.

A channel whose filter or BatchNorm factor is zero still sends a constant on. Where it is taken away, and in general any
channel, the layers behind lose what they got of it on average:

    b_o += mean over images and positions of (W[o, gone] * x[gone])      x: (N, C, H, W) into the layer

which is exact for a channel that is the same everywhere, in front of a fully connected layer or of a convolution
without padding. With zero padding the constant counts for less at the border, and no bias can say that: what is added
is the mean over the positions, which is the least squared error that a constant can have. A layer without a bias hands
it to the BatchNorm behind it (running mean -= what the bias would have got); one with neither is left.

DCIL's released checkpoints show the need: of 492 dead filters 346 send on a constant that is not zero. A ResNet-56 on
CIFAR-10 JPEG, magnitude, on 2,000 validation images without any training (24 November 2026, one draw of 512 images):

    of the MACs stay    nothing more    fold    BatchNorm's statistics anew    both
    0.7                 71.0            88.7    90.95                          90.95
    0.5                 40.4            36.1    78.85                          78.85

So where BatchNorm stands behind every reader, new statistics hold all that `fold` gives, and the shift of what lies
before as well: `all_normalised` asks for that.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersor.core.attachment import Progress
from tersor.core.errors import InputError
from tersor.core.evaluating import evaluating
from tersor.graph.calibration import first_images
from tersor.graph.capture import layer_of, sole_user
from tersor.graph.channels import Cut


def lost_by_readers(
    graph: fx.GraphModule, cuts: Sequence[Cut], data: Iterable[Any], images: int
) -> Generator[Progress, None, dict[str, Tensor]]:
    """Layer -> (C_out,): what each channel that stays there loses on average where the layer's columns in `cuts` go.

    Args:
        graph: the network before the cuts.
        cuts: what goes.
        data: batches of images (N, C, H, W).
        images: how many of them are looked at.

    Raises:
        InputError: there is no image.
    """
    readers = {cut.layer: list(cut.channels) for cut in cuts if cut.axis == "in" and _reads_whole(graph, cut.layer)}
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(readers, 0)

    def look(name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen = given[0].movedim(_channels(layer), 0)[readers[name]].movedim(0, -1)
        sums[name] = sums.get(name, 0) + seen.sum(0)
        counts[name] += len(seen)

    hooks = [graph.get_submodule(name).register_forward_pre_hook(partial(look, name)) for name in readers]
    try:
        with evaluating(graph), torch.no_grad():
            yield from _run(graph, data, images)
    finally:
        for hook in hooks:
            hook.remove()
    means = {name: sums[name] / counts[name] for name in readers if counts[name]}
    gone = {cut.layer: list(cut.channels) for cut in cuts if cut.axis == "out"}
    lost: dict[str, Tensor] = {}
    for name, mean in means.items():
        values = _contribution(graph.get_submodule(name), readers[name], mean)
        stays = torch.ones(len(values), dtype=torch.bool, device=values.device)
        stays[gone.get(name, [])] = False
        lost[name] = values[stays]
    return lost


def _run(graph: fx.GraphModule, data: Iterable[Any], images: int) -> Generator[Progress]:
    done = 0
    for some in first_images(data, images, next(graph.parameters()).device):
        graph(some)
        done += len(some)
        yield Progress("what channels send on", done, images)
    if not done:
        raise InputError("what channels send on is seen on images; none were given. Pass data=...")


def _reads_whole(graph: fx.GraphModule, name: str) -> bool:
    layer = graph.get_submodule(name)
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def _channels(layer: nn.Module) -> int:
    """The dimension of its input that holds the channels."""
    return 1 if isinstance(layer, nn.Conv2d) else -1


@torch.no_grad()
def _contribution(layer: nn.Module, places: list[int], mean: Tensor) -> Tensor:
    """(C_out,): what `layer` makes of the mean map (..., places), averaged over its positions."""
    dimension = _channels(layer)
    assert isinstance(layer.weight, Tensor)
    whole = mean.new_zeros(*mean.shape[:-1], layer.weight.shape[1])
    whole[..., places] = mean
    one = whole[None].movedim(-1, dimension)
    given = layer(one) - layer(torch.zeros_like(one))
    return given.movedim(dimension, -1).flatten(0, -2).mean(0)


@torch.no_grad()
def fold(graph: fx.GraphModule, lost: Mapping[str, Tensor]) -> None:
    """Adds what layers have lost to their biases, or to the BatchNorm behind where they have none."""
    for name, values in lost.items():
        layer, norm = graph.get_submodule(name), _norm_behind(graph, name)
        if isinstance(layer.bias, Tensor):
            layer.bias += values.to(layer.bias)
        elif norm is not None and norm.running_mean is not None:
            norm.running_mean -= values.to(norm.running_mean)


def all_normalised(graph: fx.GraphModule, cuts: Sequence[Cut]) -> bool:
    """Whether every layer whose columns are in `cuts` gives to a BatchNorm: statistics that are estimated anew hold
    what `fold` would give, and what the layers before them change too.
    """
    return all(_norm_behind(graph, cut.layer) is not None for cut in cuts if cut.axis == "in")


def _norm_behind(graph: fx.GraphModule, name: str) -> nn.BatchNorm1d | nn.BatchNorm2d | None:
    node = next((node for node in graph.graph.nodes if node.op == "call_module" and node.target == name), None)
    behind = sole_user(node) if node is not None else None
    norm = layer_of(behind) if behind is not None else None
    return norm if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) else None
