"""Keys of a captured network: those of the user's network, also for Parameters that have moved into a new layer."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

from torch import fx, nn


def keep_keys(captured: fx.GraphModule, model: nn.Module) -> None:
    """Keep the keys of `model` for Parameters that have moved into a new layer, in `captured` and in copies of it."""
    keys = {id(each): key for key, each in model.named_parameters(remove_duplicate=False)}
    known = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    own = dict(captured.named_parameters(remove_duplicate=False))
    renamed = {key: keys[id(each)] for key, each in own.items() if key not in known and id(each) in keys}
    if renamed:
        captured.register_state_dict_post_hook(partial(_rename, renamed))
        captured.register_load_state_dict_pre_hook(partial(_rename_back, renamed, own.keys() & known))
    if further := _further_keys(captured, model):
        captured.register_load_state_dict_pre_hook(partial(_drop, further))
    buffers = {key for key, _ in captured.named_buffers(remove_duplicate=False)}
    if unsaved := buffers - captured.state_dict().keys():
        captured._register_deepcopy_hook(partial(_leave_unsaved, unsaved))  # pyright: ignore[reportPrivateUsage]


def _further_keys(captured: fx.GraphModule, model: nn.Module) -> set[str]:
    """Keys of `model` for tensors that it has under several: `captured` has one of them."""
    keys: defaultdict[int, list[str]] = defaultdict(list)
    for key, tensor in model.state_dict(keep_vars=True).items():
        keys[id(tensor)].append(key)
    own = captured.state_dict().keys()
    shared = [{*each} for each in keys.values() if len(each) > 1]
    return {key for each in shared if each & own for key in each - own}


def _leave_unsaved(unsaved: set[str], copied: fx.GraphModule) -> None:
    """Before torch 2.14, a copy saves every buffer that the graph reads."""
    for node in copied.graph.find_nodes(op="get_attr"):
        if node.target in unsaved:
            path, _, name = str(node.target).rpartition(".")
            copied.get_submodule(path)._non_persistent_buffers_set.add(name)  # pyright: ignore[reportPrivateUsage]


def _drop(further: set[str], _module: nn.Module, state: dict[str, Any], prefix: str, *_others: object) -> None:
    for key in further:
        state.pop(prefix + key, None)


def _rename(renamed: dict[str, str], _module: nn.Module, state: dict[str, Any], prefix: str, _meta: object) -> None:
    for key, original in renamed.items():
        if prefix + key in state:  # not where the weight has parametrizations
            state[prefix + original] = state.pop(prefix + key)


def _rename_back(
    renamed: dict[str, str], kept: set[str], _module: nn.Module, state: dict[str, Any], prefix: str, *_others: object
) -> None:
    """`kept`: keys that an operator reads too."""
    given = {original for original in renamed.values() if prefix + original in state}
    for key, original in renamed.items():
        if original in given:
            state[prefix + key] = state[prefix + original]
    for original in given - kept:
        del state[prefix + original]
