"""Channels that belong together, and their removal for real.

A channel that goes takes along every slice that produced it and every slice that read it: the filter, its bias and
its place in BatchNorm, the columns of the layers behind, and through additions the same of other layers. Which slices
those are is found by torch-pruning's dependency graph (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR
2023) on the captured network. It does not see constants: a shortcut padded with zeros (option A of the CIFAR ResNets)
keeps its old width, and the pruned network cannot run. So every group is tried before it is offered: one channel is
removed and put back, and the answers in between are compared with those of the network whose channel is zero.

What is removed is remembered in `graph.meta["cuts"]`, plain values that `remove` replays on a fresh capture.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, fx, nn

from tersor.core.errors import InputError

Axis = Literal["out", "in"]

_NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)
_ACROSS_CHANNELS = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Cut:
    """Places of `layer` along `axis` that go: filters (`out`), or columns that read (`in`)."""

    layer: str
    axis: Axis
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Channels that go together: channel c of the group is `slices[c]`, places in several layers.

    Attributes:
        root: the layer that produces them, by name.
        slices: for every channel, what goes with it.
    """

    root: str
    slices: tuple[tuple[Cut, ...], ...]

    def cuts(self, channels: Iterable[int]) -> list[Cut]:
        """What goes with `channels` of the group, one cut for each layer and axis."""
        return merged(cut for channel in channels for cut in self.slices[channel])


def merged(cuts: Iterable[Cut]) -> list[Cut]:
    """One cut for each layer and axis: places are those of the network before any of the cuts."""
    places: defaultdict[tuple[str, Axis], set[int]] = defaultdict(set)
    for cut in cuts:
        places[cut.layer, cut.axis].update(cut.channels)
    return [Cut(layer, axis, tuple(sorted(chosen))) for (layer, axis), chosen in places.items()]


def coupled_channels(graph: fx.GraphModule, example: Tensor) -> tuple[list[Group], dict[str, str]]:
    """The groups of channels that can be removed, and of every other group's root why it stays whole.

    Args:
        graph: a captured network without masks and grids; it comes back as it was.
        example: images (N, C, H, W) as the network wants them; the first is run.

    Raises:
        InputError: the dependencies cannot be followed at all.
    """
    example = example[:1].to(next(graph.parameters()).device)
    modes = {module: module.training for module in graph.modules()}
    try:
        graph.eval()
        groups: list[Group] = []
        whole: dict[str, str] = {}
        for group in _dependencies(graph, example):
            problem = _unknown_parts(graph, group) or _failure(graph, group, example)
            if problem:
                whole[group.root] = problem
            else:
                groups.append(group)
    finally:
        for module, training in modes.items():
            module.training = training
    return groups, whole


def remove(graph: fx.GraphModule, cuts: Sequence[Cut]) -> None:
    """Removes channels in place, every Parameter object the same, and remembers it in `graph.meta["cuts"]`."""
    for cut in cuts:
        _shrink(graph.get_submodule(cut.layer), cut)
    graph.meta["cuts"] = [*graph.meta.get("cuts", []), *([cut.layer, cut.axis, list(cut.channels)] for cut in cuts)]


def _dependencies(graph: fx.GraphModule, example: Tensor) -> list[Group]:
    # on a copy: the backward graph that is followed would remember the parameters' shapes beyond their change
    copied = copy.deepcopy(graph).requires_grad_(requires_grad=True)
    try:
        # torch.fx prints what it raises
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            found = tp.DependencyGraph().build_dependency(copied, example_inputs=example, verbose=False)
            return [_group(copied, members) for members in found.get_all_groups()]
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError) as error:
        raise InputError(
            f"the channels of {type(graph).__name__} cannot be followed, so none can be removed: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'in torch-pruning'}. "
            "Possible: weight_pruning, which masks."
        ) from error


def _group(graph: fx.GraphModule, members: Any) -> Group:
    names = {module: name for name, module in graph.named_modules()}
    names |= {parameter: name for name, parameter in graph.named_parameters()}  # type: ignore[dict-item]
    places: defaultdict[int, dict[tuple[str, Axis], list[int]]] = defaultdict(dict)
    root = ""
    for member in members:
        module = member.dep.target.module
        name = names.get(module)
        if name is None:  # an operator of torch-pruning's own
            continue
        root = root or name
        reads = "in_channels" in member.dep.handler.__name__ and not _produces_what_it_reads(module)
        for channel, place in zip(member.root_idxs, member.idxs, strict=True):
            places[channel].setdefault((name, "in" if reads else "out"), []).append(place)
    slices = [
        tuple(Cut(layer, axis, tuple(sorted(set(chosen)))) for (layer, axis), chosen in places[channel].items())
        for channel in sorted(places)
    ]
    return Group(root, tuple(slices))


def _produces_what_it_reads(module: nn.Module) -> bool:
    """Whether the module hands each channel on by itself: a norm, a depthwise convolution."""
    if isinstance(module, nn.Conv2d):
        return module.groups == module.in_channels == module.out_channels and module.groups > 1
    return not isinstance(module, nn.Linear)


def _unknown_parts(graph: fx.GraphModule, group: Group) -> str:
    """What of the group `_shrink` has no rule for, or nothing."""
    if len(group.slices) < 2:
        return "it has one channel"
    modules = dict(graph.named_modules())
    for cut in group.cuts([0]):
        module = modules.get(cut.layer)
        if isinstance(module, nn.Conv2d) and module.groups > 1 and not _produces_what_it_reads(module):
            return f"{cut.layer} is a grouped convolution"
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.PReLU | nn.LayerNorm | nn.BatchNorm2d | nn.BatchNorm1d):
            kind = type(module).__name__ if module is not None else "parameter of its own"
            return f"{cut.layer} is a {kind}"
    return ""


@torch.no_grad()
def _failure(graph: fx.GraphModule, group: Group, example: Tensor) -> str:
    """Why the network without the group's last channel is not the network with that channel at zero, or nothing."""
    cuts = group.cuts([len(group.slices) - 1])
    before = graph(example)
    with _restored(graph, cuts):
        _silence(graph, cuts)
        masked = graph(example)
    with _restored(graph, cuts):
        try:
            for cut in cuts:
                _shrink(graph.get_submodule(cut.layer), cut)
            with redirect_stderr(io.StringIO()):
                removed = graph(example)
        except (RuntimeError, ValueError, IndexError) as error:
            return f"without one of its channels the network cannot run: {str(error).splitlines()[0]}"
    if removed.shape != before.shape:
        return "its channels are the answers"
    norms = [cut.layer for cut in cuts if isinstance(graph.get_submodule(cut.layer), _ACROSS_CHANNELS)]
    if not norms and not torch.allclose(removed, masked, rtol=_TOLERANCE, atol=_TOLERANCE * float(masked.abs().max())):
        return "the network without a channel answers otherwise than with that channel at zero"
    return ""


@contextmanager
def _restored(graph: fx.GraphModule, cuts: Sequence[Cut]) -> Generator[None]:
    """The layers of `cuts` come back as they were."""
    modules = {cut.layer: graph.get_submodule(cut.layer) for cut in cuts}
    settings = {name: dict(vars(module)) for name, module in modules.items()}
    tensors = {
        name: {key: tensor.data for key, tensor in [*module.named_parameters(), *module.named_buffers()]}
        for name, module in modules.items()
    }
    try:
        yield
    finally:
        for name, module in modules.items():
            vars(module).update(settings[name])
            for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
                tensor.data = tensors[name][key]


def _silence(graph: fx.GraphModule, cuts: Sequence[Cut]) -> None:
    """Zeros where `cuts` would take away, in copies: filter, bias and BatchNorm, so that the channel gives zero."""
    for cut in cuts:
        module = graph.get_submodule(cut.layer)
        for key, tensor in module.named_parameters():
            tensor.data = tensor.data.clone()
            if cut.axis == "out":
                tensor.data[list(cut.channels)] = 0
            elif key == "weight":
                tensor.data[:, list(cut.channels)] = 0


def _shrink(module: nn.Module, cut: Cut) -> None:
    """Takes the places of `cut` out of every tensor of the module, and tells its sizes."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    length = weight.shape[0 if cut.axis == "out" else 1]
    kept = torch.ones(length, dtype=torch.bool, device=weight.device)
    kept[list(cut.channels)] = False
    left = int(kept.sum())
    if cut.axis == "in":
        weight.data = weight.data[:, kept].contiguous()
        weight.grad = None
        setattr(module, "in_channels" if isinstance(module, nn.Conv2d) else "in_features", left)
        return
    depthwise = isinstance(module, nn.Conv2d) and _produces_what_it_reads(module)
    for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        if tensor.ndim:  # BatchNorm counts its batches in a scalar
            tensor.data = tensor.data[kept].contiguous()
            tensor.grad = None
    if isinstance(module, nn.Conv2d):
        module.out_channels = left
        if depthwise:
            module.in_channels = module.groups = left
    elif isinstance(module, nn.Linear):
        module.out_features = left
    elif isinstance(module, _NORMS):
        module.num_features = left
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = (left,)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = left
