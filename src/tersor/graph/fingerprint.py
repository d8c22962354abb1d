"""The fingerprint of a captured network, which shows whether a file was written for a network of the same code."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from tersor.graph.aten import operator_name
from tersor.graph.batchnorm import Freezable

FINGERPRINT = "fingerprint"
"""Key in a captured network's `meta`: a hash of its operators and of the settings of its layers when captured."""

_CONSTANTS = (bool, int, float, str, torch.dtype)
_PLAIN = (*_CONSTANTS, type(None))
_NO_SETTINGS = {"training", "frozen", "in_features", "out_features", "in_channels", "out_channels"}
"""Attributes of a layer that training changes, or that its weights show: a new head may have other classes."""


def fingerprint(captured: fx.GraphModule) -> str:
    """Equal for networks of one class; another stride, activation, constant or order changes it."""
    places = {node: place for place, node in enumerate(captured.graph.nodes)}
    parts: list[str] = []
    for node in captured.graph.nodes:
        leaves = tree_leaves((node.args, node.kwargs))
        inputs = [places[each] for each in leaves if isinstance(each, fx.Node)]
        constants = [each for each in leaves if isinstance(each, _CONSTANTS)]
        called = f"{node.target} " if node.op == "call_module" else ""
        parts.append(f"{node.op} {called}{operator_name(node)} {_settings(captured, node)} {constants} {inputs}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _settings(captured: fx.GraphModule, node: fx.Node) -> str:
    """The settings of a layer, or the value of a scalar that `forward` creates."""
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        module = captured.get_submodule(owner)
        value = getattr(module, name)
        scalar = isinstance(value, Tensor) and value.numel() == 1 and not isinstance(value, nn.Parameter)
        return str(value.item()) if scalar and name not in module.state_dict() else ""
    if node.op != "call_module":
        return ""
    layer = captured.get_submodule(str(node.target))
    settings = {name: each for name, each in vars(layer).items() if name[0] != "_" and name not in _NO_SETTINGS}
    plain = {
        name: each for name, each in settings.items() if all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(each))
    }
    return f"{_kind(layer)} {plain}"


def _kind(layer: nn.Module) -> str:
    """The class of a layer without what masks, quantizers and freezing add to it."""
    kind = parametrize.type_before_parametrizations(layer)
    return next(each.__name__ for each in kind.__mro__ if not issubclass(each, Freezable))
