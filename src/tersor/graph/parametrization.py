"""Parametrizations of a weight: `module.weight` is computed from a Parameter, which stays the same object.

They are those of `torch.nn.utils.parametrize`.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def parametrizations_of(module: nn.Module, name: str = "weight") -> Iterator[nn.Module]:
    """The parametrizations of a parameter of `module`, in the order of application."""
    if parametrize.is_parametrized(module, name):
        yield from parametrized(module, name)


def parametrized(module: nn.Module, name: str = "weight") -> parametrize.ParametrizationList:
    """The parametrizations of a parameter of `module`, which has some; `.original` is the Parameter."""
    return cast("parametrize.ParametrizationList", cast("nn.ModuleDict", module.parametrizations)[name])


def original_weight(layer: nn.Module) -> Tensor:
    """The Parameter of the layer's weight, under its parametrizations if it has some."""
    weight = parametrized(layer).original if parametrize.is_parametrized(layer, "weight") else layer.weight
    assert isinstance(weight, Tensor)
    return weight


def parametrization_input(module: nn.Module, parametrization: nn.Module, name: str = "weight") -> Tensor:
    """The input of one parametrization of `module`: the Parameter after all parametrizations before it."""
    chain = parametrized(module, name)
    value = chain.original
    assert isinstance(value, Tensor)
    for each in chain:
        if each is parametrization:
            return value.detach()
        value = each(value)
    raise AssertionError(f"{parametrization} is not on {name}")


def in_float32(model: nn.Module) -> nn.Module:
    """`model`, or a float32 copy if it has parameters of another precision, because quantizers return float32."""
    if all(each.dtype == torch.float32 for each in model.parameters()):
        return model
    return copy.deepcopy(model).float()


def strip(model: nn.Module, modules: Container[int] | None = None) -> nn.Module:
    """A copy of `model` with weights in place of parametrizations, of all modules or of those with ids in `modules`.

    A deep copy of a parametrized module shares its class with the original, so removing the copy's parametrizations
    would break the original. Therefore plain modules are built first and substituted.
    """
    plain: dict[int, Any] = {}
    for module in reversed(list(model.modules())):  # children first
        if parametrize.is_parametrized(module) and (modules is None or id(module) in modules):
            plain[id(module)] = _plain(module, plain)
    return copy.deepcopy(model, plain)


def _plain(module: nn.Module, copies: dict[int, Any]) -> nn.Module:
    names = list(cast("nn.ModuleDict", module.parametrizations))
    unparametrized = cast("type[nn.Module]", type(module).__mro__[1])
    result = unparametrized.__new__(unparametrized)
    children = {name: child for name, child in vars(module)["_modules"].items() if name != "parametrizations"}
    result.__dict__.update(copy.deepcopy({**vars(module), "_modules": children}, copies))
    for name in names:
        result.register_parameter(name, nn.Parameter(cast("Tensor", getattr(module, name)).detach().clone()))
    return result
