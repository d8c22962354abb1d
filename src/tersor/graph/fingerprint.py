"""The fingerprint of a captured network, which shows whether a file was written for a network of the same code."""

from __future__ import annotations

import hashlib

import torch
from torch import fx, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from tersor.graph.aten import operator_name
from tersor.graph.batchnorm import Freezable

FINGERPRINT = "fingerprint"
"""Key in a captured network's `meta`: a hash of its operators and of the settings of its layers when captured."""

_CONSTANTS = (bool, int, float, str, torch.dtype)


def fingerprint(captured: fx.GraphModule) -> str:
    """Equal for networks of one class and size; another stride, activation, constant or order changes it."""
    parts: list[str] = []
    for node in captured.graph.nodes:
        layer = captured.get_submodule(str(node.target)) if node.op == "call_module" else None
        settings = "" if layer is None else f"{_kind(layer)}({layer.extra_repr()})"
        constants = [each for each in tree_leaves((node.args, node.kwargs)) if isinstance(each, _CONSTANTS)]
        parts.append(f"{node.op} {operator_name(node)} {settings} {constants}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _kind(layer: nn.Module) -> str:
    """The class of a layer without what masks, quantizers and freezing add to it."""
    kind = parametrize.type_before_parametrizations(layer)
    return next(each.__name__ for each in kind.__mro__ if not issubclass(each, Freezable))
