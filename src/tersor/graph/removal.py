"""Channels gone for real: from the tensors of layers, from parameters, from the arguments of nodes that count them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from tersor.graph.attention import Attention, windowed_attention
from tersor.graph.coupling.groups import Cut


def merged(cuts: Iterable[Cut]) -> list[Cut]:
    """One cut for each layer and axis: places are those of the network before any of the cuts."""
    places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for cut in cuts:
        places[cut.layer, cut.axis].update(cut.channels)
    return [Cut(layer, axis, tuple(sorted(chosen))) for (layer, axis), chosen in places.items()]


def remove(graph: fx.GraphModule, cuts: Sequence[Cut]) -> None:
    """Removes channels in place, every Parameter object the same, and adds it to the rounds in `graph.meta["cuts"]`.

    Args:
        graph: a captured network.
        cuts: those that a group gives, `merged`.
    """
    modules = dict(graph.named_modules())
    tensors = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    nodes = {node.name: node for node in graph.graph.nodes}
    of_layer: defaultdict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    left_out: list[tuple[fx.Node, int]] = []
    for cut in sorted(cuts, key=lambda cut: not cut.axis.startswith("pin ")):  # a number first, then what it counts
        if cut.axis.startswith("gives="):
            left_out.append((nodes[cut.layer], int(cut.axis.removeprefix("gives="))))
        elif "=" in cut.axis:
            _rewrite(nodes[cut.layer], cut)
        elif cut.axis.isdecimal():
            _own_attention(graph, cut.layer)
            _shorten(tensors[cut.layer], int(cut.axis), _kept(tensors[cut.layer].shape[int(cut.axis)], cut.channels))
        else:
            of_layer[cut.layer][cut.axis] = cut.channels
    for name, places in of_layer.items():
        if "heads" in places:
            _own_attention(graph, f"{name}.in_proj_weight")
            graph.get_submodule(name).num_heads -= len(places["heads"])  # pyright: ignore[reportOperatorIssue]
        else:
            _shrink(modules[name], places)
    for node, stays in left_out:
        _leave_out(graph, node, stays)
    graph.recompile()
    round_ = [[cut.layer, cut.axis, list(cut.channels)] for cut in cuts]
    graph.meta["cuts"] = [*graph.meta.get("cuts", []), round_]


def _leave_out(graph: fx.GraphModule, total: fx.Node, stays: int) -> None:
    """A sum gives its argument number `stays`: the other goes, with all that was computed for it alone."""
    total.replace_all_uses_with(total.args[stays])  # pyright: ignore[reportArgumentType]  # a node
    waiting = [total]
    while waiting:
        node = waiting.pop()
        read = node.all_input_nodes
        graph.graph.erase_node(node)
        if node.op in ("call_module", "get_attr"):
            _forget(graph, str(node.target))
        waiting += [each for each in read if not each.users and each.op != "placeholder" and each not in waiting]


def _forget(graph: fx.GraphModule, name: str) -> None:
    """A layer, parameter or buffer, if no node reads it any more; modes stay."""
    path, _, last = name.rpartition(".")
    owner = graph.get_submodule(path)
    read = any(node.target == name for node in graph.graph.nodes if node.op in ("call_module", "get_attr"))
    if not read and isinstance(getattr(owner, last), nn.Module | Tensor):
        delattr(owner, last)


def _kept(size: int, gone: Iterable[int]) -> Tensor:
    kept = torch.ones(size, dtype=torch.bool)
    kept[list(gone)] = False
    return kept


def _shorten(tensor: Tensor, axis: int, kept: Tensor) -> None:
    """Takes places out of a tensor that stays the same object."""
    tensor.data = tensor.data.index_select(axis, kept.nonzero().flatten().to(tensor.device)).contiguous()
    tensor.grad = None


def _own_attention(graph: fx.GraphModule, parameter: str) -> None:
    """Puts our own attention in the place of torch's, which cannot be narrower than its embedding."""
    path = parameter.rpartition(".")[0]
    owner = graph.get_submodule(path)
    if isinstance(owner, nn.MultiheadAttention):
        graph.set_submodule(path, Attention(owner))


def _shrink(module: nn.Module, places: dict[str, tuple[int, ...]]) -> None:
    """Takes the places out of every tensor of the module, and tells its sizes."""
    if isinstance(module, _ConvNd):
        _shrink_convolution(module, places)
    elif isinstance(module, nn.Linear):
        if "in" in places:
            kept = _kept(module.in_features, places["in"])
            _shorten(module.weight, 1, kept)
            module.in_features = int(kept.sum())
        if "out" in places:
            kept = _kept(module.out_features, places["out"])
            for tensor in module.parameters(recurse=False):
                _shorten(tensor, 0, kept)
            module.out_features = int(kept.sum())
    else:
        _shrink_per_channel(module, places["out"])


def _shrink_convolution(layer: _ConvNd, places: dict[str, tuple[int, ...]]) -> None:
    """Whole groups of channels may go, or the same number from each group."""
    rows, columns = layer.weight.shape[:2]
    if "out" in places and "in" not in places and layer.groups == layer.in_channels == rows:
        places = {**places, "in": places["out"]}  # it hands every channel on by itself
    kept_out, kept_in = _kept(rows, places.get("out", ())), _kept(layer.in_channels, places.get("in", ()))
    by_group = kept_in.reshape(layer.groups, columns)
    groups = by_group.any(1)
    of_group = by_group[int(groups.nonzero()[0])]
    assert bool((by_group[groups] == of_group).all()), "the same places of every group"
    _shorten(layer.weight, 1, of_group)
    for tensor in [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]:
        if tensor.ndim and len(tensor) == rows:
            _shorten(tensor, 0, kept_out)
    layer.groups = int(groups.sum())
    layer.in_channels, layer.out_channels = int(kept_in.sum()), int(kept_out.sum())


def _shrink_per_channel(module: nn.Module, gone: tuple[int, ...]) -> None:
    tensors = [each for each in [*module.parameters(), *module.buffers()] if each.numel() > 1]
    kept = _kept(tensors[0].numel(), gone)
    for tensor in tensors:
        _shorten(tensor, next(axis for axis, size in enumerate(tensor.shape) if size > 1), kept)
    left = int(kept.sum())
    if isinstance(module, nn.GroupNorm):
        module.num_groups = int(kept.reshape(module.num_groups, -1).any(1).sum())
    told: dict[str, Any] = dict.fromkeys(("num_features", "num_channels", "num_parameters"), left)
    told["normalized_shape"] = (left,)
    if isinstance(laid_out := getattr(module, "shape", None), tuple):  # a scale that is laid out anew
        told["shape"] = tuple(left if size == len(kept) else size for size in laid_out)
    for name, size in told.items():
        if hasattr(module, name):
            setattr(module, name, size)


def _rewrite(node: fx.Node, cut: Cut) -> None:
    """An argument counts less than it did; `axis` says which, and what it counted."""
    argument, _, before = cut.axis.partition("=")
    if argument == "sections":
        _rewrite_sections(node, [int(size) for size in before.split(",")], cut.channels)
    elif argument.startswith("pin "):
        first, *path = argument.removeprefix("pin ").split(".")
        setattr(node, first, _replaced(getattr(node, first), path, int(before)))
    elif argument == "scale":
        node.kwargs = {**node.kwargs, "scale": int(before) ** -0.5}
    elif argument == "windowed":
        if node.target is not windowed_attention:
            node.target = windowed_attention
            node.kwargs = {**node.kwargs, "scale": int(before) ** -0.5}
    else:
        first, *path = argument.split(".")
        value = _replaced(getattr(node, first), path, int(before) - len(cut.channels))
        setattr(node, first, value)


def _rewrite_sections(node: fx.Node, sizes: list[int], gone: tuple[int, ...]) -> None:
    """chunk and split, from now on by the sizes of their parts."""
    kept = _kept(sum(sizes), gone)
    left = [int(part.sum()) for part in kept.split(sizes)]
    dim = [*node.args[2:], node.kwargs.get("dim", 0)][0]
    node.op, node.target = "call_function", torch.split
    node.args, node.kwargs = (node.args[0], left, dim), {}


def _replaced(value: Any, path: Sequence[str], new: int) -> Any:
    """`value` with `new` at the end of `path`, within lists, tuples and slices."""
    if not path:
        return new
    step, *rest = path
    if isinstance(value, slice):
        parts = {name: getattr(value, name) for name in ("start", "stop", "step")}
        parts[step] = new
        return slice(*parts.values())
    if isinstance(value, dict):
        return {**value, step: _replaced(value[step], rest, new)}
    place = int(step)
    return type(value)([*value[:place], _replaced(value[place], rest, new), *value[place + 1 :]])
