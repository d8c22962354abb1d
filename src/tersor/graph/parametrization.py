"""Parametrizations of a weight: the Parameter stays, `module.weight` shows what they make of it.

A weight carries its parametrizations through `torch.nn.utils.parametrize`. The Parameter object is the same as before.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def parametrizations_of(module: nn.Module, name: str = "weight") -> Iterator[nn.Module]:
    """The parametrizations of one parameter of `module`, in the order in which they apply."""
    if parametrize.is_parametrized(module, name):
        yield from parametrized(module, name)


def parametrized(module: nn.Module, name: str = "weight") -> parametrize.ParametrizationList:
    """The parametrizations of one parameter of `module`, which has some; `.original` is the Parameter."""
    return cast("parametrize.ParametrizationList", cast("nn.ModuleDict", module.parametrizations)[name])


def original_weight(layer: nn.Module) -> Tensor:
    """The Parameter of the layer's weight, under its parametrizations if it has some."""
    weight = parametrized(layer).original if parametrize.is_parametrized(layer, "weight") else layer.weight
    assert isinstance(weight, Tensor)
    return weight


def parametrization_input(module: nn.Module, parametrization: nn.Module, name: str = "weight") -> Tensor:
    """What one of the parametrizations of a parameter of `module` is given: the Parameter as those before show it."""
    chain = parametrized(module, name)
    value = chain.original
    assert isinstance(value, Tensor)
    for each in chain:
        if each is parametrization:
            return value.detach()
        value = each(value)
    raise AssertionError(f"{parametrization} does not lie on {name}")


def in_float32(model: nn.Module) -> nn.Module:
    """`model` itself, or a copy where it has parameters of another precision: a quantizer gives float32."""
    if all(each.dtype == torch.float32 for each in model.parameters()):
        return model
    return copy.deepcopy(model).float()


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
