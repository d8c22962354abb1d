"""A network as a plain copy: without parametrizations, its weights as they showed them."""

from __future__ import annotations

import copy
from collections.abc import Container
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize


def strip(model: nn.Module, modules: Container[int] | None = None) -> nn.Module:
    """A plain copy of `model` whose weights are what the parametrizations showed: all, or those of `modules`, by `id`.

    A parametrized module under `deepcopy` shares its class with the original, and removing the copy's parametrizations
    would break the original. So the plain modules are built first and put in their place.
    """
    plain: dict[int, Any] = {}
    for module in reversed(list(model.modules())):  # children first
        if parametrize.is_parametrized(module) and (modules is None or id(module) in modules):
            plain[id(module)] = _plain(module, plain)
    return copy.deepcopy(model, plain)


def _plain(module: nn.Module, copies: dict[int, Any]) -> nn.Module:
    shown = list(cast("nn.ModuleDict", module.parametrizations))
    unparametrized = cast("type[nn.Module]", type(module).__mro__[1])
    result = unparametrized.__new__(unparametrized)
    children = {name: child for name, child in vars(module)["_modules"].items() if name != "parametrizations"}
    result.__dict__.update(copy.deepcopy({**vars(module), "_modules": children}, copies))
    for name in shown:
        result.register_parameter(name, nn.Parameter(cast("Tensor", getattr(module, name)).detach().clone()))
    return result
