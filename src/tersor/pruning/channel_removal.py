"""Removal of channels from layers, parameters and the arguments of nodes, and of whole residual branches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from tersor.graph.aten import arguments, operator_name
from tersor.pruning.dependency.groups import Cut


def merge_cuts(cuts: Iterable[Cut]) -> list[Cut]:
    """One cut for each layer and axis; all indices are those before any of the cuts."""
    channels: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for cut in cuts:
        channels[cut.layer, cut.axis].update(cut.channels)
    return [Cut(layer, axis, tuple(sorted(chosen))) for (layer, axis), chosen in channels.items()]


def remove(graph: fx.GraphModule, cuts: Sequence[Cut]) -> None:
    """Remove channels and branches in place, and append the cuts as a round to `graph.meta["cuts"]`.

    Every remaining Parameter stays the same object.

    Args:
        graph: a captured network.
        cuts: cuts of groups (`merge_cuts`) and of branches.
    """
    modules = dict(graph.named_modules())
    tensors = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    nodes = {node.name: node for node in graph.graph.nodes}
    of_layer: defaultdict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    branches: list[tuple[fx.Node, int]] = []
    for cut in cuts:
        if cut.axis.startswith("gives="):
            branches.append((nodes[cut.layer], int(cut.axis.removeprefix("gives="))))
        elif "=" in cut.axis:
            _rewrite_argument(nodes[cut.layer], cut)
        elif cut.axis.isdecimal():
            size = tensors[cut.layer].shape[int(cut.axis)]
            _select(tensors[cut.layer], int(cut.axis), _remaining(size, cut.channels))
        else:
            of_layer[cut.layer][cut.axis] = cut.channels
    for name, channels in of_layer.items():
        _shrink(modules[name], channels)
    for node, keep in branches:
        _remove_branch(graph, node, keep)
    graph.recompile()
    round_ = [[cut.layer, cut.axis, list(cut.channels)] for cut in cuts]
    graph.meta["cuts"] = [*graph.meta.get("cuts", []), round_]


def exclusive_nodes(value: fx.Node) -> set[fx.Node]:
    """`value` and the nodes computed for it alone; empty if it has more than one user."""
    nodes: set[fx.Node] = set()
    waiting = [value] if sum(not _unused(user) for user in value.users) == 1 else []
    while waiting:
        node = waiting.pop()
        nodes |= {node, *_unused_users(node)}
        inputs = [each for each in node.all_input_nodes if each.op != "placeholder" and each not in nodes]
        waiting += [each for each in inputs if all(user in nodes or _unused(user) for user in each.users)]
    return nodes


def _unused_users(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if _unused(user):
            yield from (user, *_unused_users(user))


def _unused(node: fx.Node) -> bool:
    """Whether a node reads a size or an item, and nothing uses the result."""
    return operator_name(node) in ("getitem", "sym_size") and all(map(_unused, node.users))


def _remove_branch(graph: fx.GraphModule, total: fx.Node, keep: int) -> None:
    """Replace a sum with its argument number `keep`; remove the other one with everything computed for it alone."""
    if total not in set(graph.graph.nodes):  # it belonged to another removed branch
        return
    kept, added = total.args[keep], total.args[1 - keep]
    assert isinstance(kept, fx.Node)
    assert isinstance(added, fx.Node)
    removed = {total, *exclusive_nodes(added)}
    if any(_is_inplace(graph, user) for user in total.users):  # it must not change what others read
        with graph.graph.inserting_before(total):
            kept = graph.graph.call_function(torch.ops.aten.clone.default, (kept,))
    total.replace_all_uses_with(kept)
    for node in reversed([*graph.graph.nodes]):
        if node in removed:
            graph.graph.erase_node(node)
    for node in removed:
        if node.op in ("call_module", "get_attr"):
            _delete_unused(graph, str(node.target))
    names = {node.name for node in removed}
    layers = {path: kept.name if name == total.name else name for path, name in graph.meta.get("layers", {}).items()}
    graph.meta["layers"] = {path: name for path, name in layers.items() if name not in names}


def _is_inplace(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may change its input in place."""
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _delete_unused(graph: fx.GraphModule, name: str) -> None:
    """Delete a layer, parameter or buffer if no node reads it, its parent or a part of it."""
    used = {str(node.target) for node in graph.graph.nodes if node.op in ("call_module", "get_attr")}
    if any(each == name or each.startswith(f"{name}.") or name.startswith(f"{each}.") for each in used):
        return
    owner: Any = graph
    *path, last = name.split(".")
    for step in path:
        owner = getattr(owner, step, None)  # None if it was deleted before
    if isinstance(getattr(owner, last, None), nn.Module | Tensor):
        delattr(owner, last)


def _remaining(size: int, removed: Iterable[int]) -> Tensor:
    """Bool mask (size,)."""
    mask = torch.ones(size, dtype=torch.bool)
    mask[list(removed)] = False
    return mask


def _select(tensor: Tensor, axis: int, mask: Tensor) -> None:
    """Shorten a tensor, which stays the same object."""
    tensor.data = tensor.data.index_select(axis, mask.nonzero().flatten().to(tensor.device)).contiguous()
    tensor.grad = None


def _shrink(module: nn.Module, channels: dict[str, tuple[int, ...]]) -> None:
    """Remove channels from every tensor of a module, and update its attributes."""
    if isinstance(module, _ConvNd):
        _shrink_convolution(module, channels)
    elif isinstance(module, nn.Linear):
        if "in" in channels:
            mask = _remaining(module.in_features, channels["in"])
            _select(module.weight, 1, mask)
            module.in_features = int(mask.sum())
        if "out" in channels:
            mask = _remaining(module.out_features, channels["out"])
            for tensor in module.parameters(recurse=False):
                _select(tensor, 0, mask)
            module.out_features = int(mask.sum())
    else:
        _shrink_per_channel(module, channels["out"])


def _shrink_convolution(layer: _ConvNd, channels: dict[str, tuple[int, ...]]) -> None:
    """Remove whole groups of channels, or the same channels of every group."""
    if layer.transposed:
        _shrink_transposed(layer, channels)
        return
    rows, columns = layer.weight.shape[:2]
    if "out" in channels and "in" not in channels and layer.groups == layer.in_channels == rows:
        channels = {**channels, "in": channels["out"]}  # depthwise
    out_mask = _remaining(rows, channels.get("out", ()))
    in_mask = _remaining(layer.in_channels, channels.get("in", ()))
    by_group = in_mask.reshape(layer.groups, columns)
    groups = by_group.any(1)
    of_group = by_group[int(groups.nonzero()[0])]
    assert bool((by_group[groups] == of_group).all()), "the same channels of every group"
    _select(layer.weight, 1, of_group)
    for tensor in [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]:
        if tensor.ndim and len(tensor) == rows:
            _select(tensor, 0, out_mask)
    layer.groups = int(groups.sum())
    layer.in_channels, layer.out_channels = int(in_mask.sum()), int(out_mask.sum())


def _shrink_transposed(layer: _ConvNd, channels: dict[str, tuple[int, ...]]) -> None:
    """The weight of a transposed convolution is (in, out, ...)."""
    in_mask = _remaining(layer.in_channels, channels.get("in", ()))
    out_mask = _remaining(layer.out_channels, channels.get("out", ()))
    _select(layer.weight, 0, in_mask)
    _select(layer.weight, 1, out_mask)
    if layer.bias is not None:
        _select(layer.bias, 0, out_mask)
    layer.in_channels, layer.out_channels = int(in_mask.sum()), int(out_mask.sum())


def _shrink_per_channel(module: nn.Module, removed: tuple[int, ...]) -> None:
    tensors = [each for each in [*module.parameters(), *module.buffers()] if each.numel() > 1]
    mask = _remaining(len(tensors[0]), removed)
    for tensor in tensors:
        _select(tensor, 0, mask)
    width = int(mask.sum())
    if isinstance(module, nn.GroupNorm):
        module.num_groups = int(mask.reshape(module.num_groups, -1).any(1).sum())
    attributes: dict[str, Any] = dict.fromkeys(("num_features", "num_channels", "num_parameters"), width)
    attributes["normalized_shape"] = (width,)
    for name, size in attributes.items():
        if hasattr(module, name):
            setattr(module, name, size)


def _rewrite_argument(node: fx.Node, cut: Cut) -> None:
    """Lower an argument that counts channels; `cut.axis` is its path and its value before."""
    argument, _, before = cut.axis.partition("=")
    if argument == "sections":
        _rewrite_sections(node, [int(size) for size in before.split(",")], cut.channels)
    elif argument == "scale":
        node.kwargs = {**node.kwargs, "scale": int(before) ** -0.5}
    else:
        first, *path = argument.split(".")
        value = _replaced(getattr(node, first), path, int(before) - len(cut.channels))
        setattr(node, first, value)


def _rewrite_sections(node: fx.Node, sizes: list[int], removed: tuple[int, ...]) -> None:
    """Rewrite chunk and split with the remaining sizes."""
    mask = _remaining(sum(sizes), removed)
    remaining = [int(part.sum()) for part in mask.split(sizes)]
    node.args, node.kwargs = (node.args[0], remaining, arguments(node)["dim"]), {}
    node.target = torch.ops.aten.split_with_sizes.default


def _replaced(value: Any, path: Sequence[str], new: int) -> Any:
    """`value` with `new` at the end of `path`, within lists, tuples and dicts."""
    if not path:
        return new
    step, *rest = path
    if isinstance(value, dict):
        return {**value, step: _replaced(value[step], rest, new)}
    place = int(step)
    return type(value)([*value[:place], _replaced(value[place], rest, new), *value[place + 1 :]])
