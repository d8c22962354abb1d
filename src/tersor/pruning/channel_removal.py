"""Channels gone for real: from the tensors of layers, from parameters, from the arguments of nodes that count them; and
branches, with all that is computed for them alone.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from tersor.pruning.dependency.groups import Cut
from tersor.pruning.narrow_attention import Attention, windowed_attention

_AUGMENTED = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def merged(cuts: Iterable[Cut]) -> list[Cut]:
    """One cut for each layer and axis: places are those of the network before any of the cuts."""
    places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for cut in cuts:
        places[cut.layer, cut.axis].update(cut.channels)
    return [Cut(layer, axis, tuple(sorted(chosen))) for (layer, axis), chosen in places.items()]


def remove(graph: fx.GraphModule, cuts: Sequence[Cut]) -> None:
    """Removes channels and branches in place, every Parameter that stays the same object, and adds it to the rounds in
    `graph.meta["cuts"]`.

    Args:
        graph: a captured network.
        cuts: those that groups give, `merged`, and those of branches.
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


def alone(value: fx.Node) -> set[fx.Node]:
    """What is computed for the one reader of `value` alone, and it; nothing where it has more readers."""
    found: set[fx.Node] = set()
    waiting = [value] if sum(not _idle(reader) for reader in value.users) == 1 else []
    while waiting:
        node = waiting.pop()
        found |= {node, *_idlers(node)}
        read = [each for each in node.all_input_nodes if each.op != "placeholder" and each not in found]
        waiting += [each for each in read if all(reader in found or _idle(reader) for reader in each.users)]
    return found


def _idlers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads `node`, and is read by nothing."""
    for reader in node.users:
        if _idle(reader):
            yield from (reader, *_idlers(reader))


def _idle(node: fx.Node) -> bool:
    """Whether a node looks at a size or takes a part, and nothing reads that."""
    return node.target in (getattr, operator.getitem, "size", "dim") and all(map(_idle, node.users))


def _leave_out(graph: fx.GraphModule, total: fx.Node, stays: int) -> None:
    """A sum gives its argument number `stays`: the other goes, with all that was computed for it alone."""
    if total not in set(graph.graph.nodes):  # it was computed for another one's
        return
    left, added = total.args[stays], total.args[1 - stays]
    assert isinstance(left, fx.Node)
    assert isinstance(added, fx.Node)
    gone = {total, *alone(added)}
    if any(_in_place(graph, reader) for reader in total.users):  # which may not change what others read, too
        with graph.graph.inserting_before(total):
            left = graph.graph.call_method("clone", (left,))
    total.replace_all_uses_with(left)
    for node in reversed([*graph.graph.nodes]):
        if node in gone:
            graph.graph.erase_node(node)
    for node in gone:
        if node.op in ("call_module", "get_attr"):
            _forget(graph, str(node.target))
    names = {node.name for node in gone}
    layers = {path: left.name if name == total.name else name for path, name in graph.meta.get("layers", {}).items()}
    graph.meta["layers"] = {path: name for path, name in layers.items() if name not in names}


def _in_place(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether it may change what it reads."""
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    if node.target in _AUGMENTED or node.kwargs.get("inplace") is True:
        return True
    if getattr(node.target, "__module__", "") == "torch.nn.functional":
        return any(each is True for each in node.args)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_")


def _forget(graph: fx.GraphModule, name: str) -> None:
    """A layer, parameter or buffer, if no node reads it or what lies in it any more; modes stay."""
    read = {str(node.target) for node in graph.graph.nodes if node.op in ("call_module", "get_attr")}
    if any(each == name or each.startswith(f"{name}.") or name.startswith(f"{each}.") for each in read):
        return
    owner: Any = graph
    *path, last = name.split(".")
    for step in path:
        owner = getattr(owner, step, None)  # which went before, with all in it
    if isinstance(getattr(owner, last, None), nn.Module | Tensor):
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
