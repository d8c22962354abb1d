"""A plain copy of a user's network: without training wrappers, and with torch's weight reparametrizations folded.

DataParallel, DistributedDataParallel, `torch.compile` and AveragedModel wrap a network or a part of it. weight_norm,
spectral_norm and `torch.nn.utils.prune` recompute a weight in every forward; in eval mode that weight is constant, so
folding is exact. The user's network stays unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from pickle import PicklingError
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm
from torch.optim.swa_utils import AveragedModel

from tersor.core.errors import InputError
from tersor.graph.parametrization import parametrized, strip
from tersor.graph.stored_functions import use_copied_parts

_UNCOPIED = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, PicklingError)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside any number of wrappers."""
    while True:
        if isinstance(model, nn.DataParallel | DistributedDataParallel | AveragedModel):
            model = cast("nn.Module", model.module)
        elif type(model).__name__ == "OptimizedModule":  # of torch.compile; to import its class takes seconds
            model = cast("nn.Module", model._orig_mod)
        else:
            return model


def plain_copy(model: nn.Module, name: str = "the network") -> nn.Module:
    """A float32 copy of the network in eval mode, without wrappers and with folded weights.

    Args:
        model: a user's network; it stays unchanged.
        name: name of the network in error messages.

    Raises:
        InputError: this is not a network with usable weights, or it cannot be copied.
    """
    require_network(model, name)
    plain = _copied(unwrapped(model), name).eval()
    _unwrap_parts(plain)
    plain = _folded(plain)
    for module in plain.modules():  # accelerate wraps the forward method to change its precision
        if "_original_forward" in vars(module):
            del module._original_forward, module.forward
    if any(each.is_floating_point() and each.dtype != torch.float32 for each in plain.state_dict().values()):
        plain = plain.float()
    return plain


def require_network(model: object, name: str = "the network") -> None:
    """Check that this is a network with usable weights.

    Raises:
        InputError: it is not.
    """
    if isinstance(model, type):
        raise InputError(f"{name} is the class {model.__name__}. Pass an instance: {model.__name__}(...).")
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} is of type {type(model).__name__}. Pass a torch.nn.Module{_how_to_get_one(model)}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(f"{name} is a TorchScript program. Pass the torch.nn.Module that it was made from.")
    named = list(model.named_parameters())
    for key, each in named:
        if isinstance(each, nn.parameter.UninitializedParameter):
            raise InputError(f"{key} of {name} has no shape yet. Run the network on one batch first.")
        if each.is_meta:
            raise InputError(f"{key} of {name} is on the meta device and has no values. Load its weights first.")
        if not each.isfinite().all():
            shown = key.replace("parametrizations.", "").removesuffix(".original")
            raise InputError(f"{shown} of {name} has values that are not finite (NaN or infinity). Load other weights.")


def refuse_without_weights(model: nn.Module, name: str = "the network") -> None:
    """Check that the network has parameters.

    Raises:
        InputError: it has none.
    """
    if next(model.parameters(), None) is None:
        raise InputError(f"{name} (of type {type(model).__name__}) has no parameters. Pass a network with layers.")


def folding_notes(model: nn.Module) -> list[str]:
    """A line for each layer of a user's network whose reparametrization a plain copy no longer has in training."""
    notes: list[str] = []
    for path, module in model.named_modules():
        kinds = {type(each) for each in _hooks(module)}
        if any(issubclass(each, prune.BasePruningMethod) for each in kinds):
            notes.append(
                f"{path}: the mask of torch.nn.utils.prune was applied to the weight; training can change the masked "
                "weights"
            )
        of_torch = parametrize.is_parametrized(module) and _is_of_torch(module)
        if of_torch or kinds & {WeightNorm, SpectralNorm}:
            notes.append(
                f"{path}: its reparametrization (weight_norm, spectral_norm or another one of torch.nn.utils) was "
                "folded into the weight, which is trained without it"
            )
    return notes


def _how_to_get_one(given: object) -> str:
    if isinstance(given, dict):
        return ": build the network, and call its load_state_dict with this dict"
    if isinstance(given, str) or hasattr(given, "__fspath__"):
        if isinstance(given, str) and given.isidentifier() and not Path(given).exists():
            return f", not a name: tersor.models.build('{given}') builds a network of tersor or torchvision"
        return f", not a path: build the network, then tersor.models.load_weights(network, '{given}')"
    return ""


def _copied(model: nn.Module, name: str) -> nn.Module:
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in _computed(model)}
    try:
        copied = copy.deepcopy(model, memo)
    except _UNCOPIED as error:
        culprit = next(_uncopied(model), "an attribute")
        reason = (str(error).splitlines() or [repr(error)])[0].rstrip(".")
        raise InputError(
            f"{name} cannot be copied, because of {culprit}: {reason}. Remove it from the network."
        ) from error
    use_copied_parts(copied, memo)
    return copied


def _computed(model: nn.Module) -> Iterator[Tensor]:
    """Computed tensors stored in modules (feature maps, weights), which deepcopy refuses."""
    for module in model.modules():
        for value in vars(module).values():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            yield from (each for each in held if isinstance(each, Tensor) and not each.is_leaf)


def _uncopied(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_modules", "_parameters"):
                continue
            try:
                copy.deepcopy(value)
            except _UNCOPIED:
                yield f"{path}.{key} ({type(value).__name__})".lstrip(".")


def _unwrap_parts(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if (inner := unwrapped(child)) is not child:
                setattr(module, name, inner)


def _folded(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for hook in _hooks(module):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                _remove_spectral_norm(module, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)  # pyright: ignore[reportPrivateUsage]
    of_torch = {
        id(module) for module in model.modules() if parametrize.is_parametrized(module) and _is_of_torch(module)
    }
    return strip(model, of_torch) if of_torch else model


def _remove_spectral_norm(module: nn.Module, name: str) -> None:
    """Fold the norm, and remove its hook for loading, which torch does not find because it is wrapped."""
    remove_spectral_norm(module, name)
    hooks = vars(module)["_load_state_dict_pre_hooks"]
    for key, hook in list(hooks.items()):
        if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
            del hooks[key]


def _hooks(module: nn.Module) -> list[object]:
    return list(vars(module)["_forward_pre_hooks"].values())


def _is_of_torch(module: nn.Module) -> bool:
    names = cast("nn.ModuleDict", module.parametrizations)
    return all(
        type(each).__module__.startswith("torch.nn.utils") for name in names for each in parametrized(module, name)
    )
