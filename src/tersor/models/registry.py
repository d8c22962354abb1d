"""Build networks by name, with random weights. Nothing is downloaded."""

from __future__ import annotations

from torch import nn

from tersor.core.errors import InputError, unknown
from tersor.core.import_path import accepts, call_with, import_function, is_function_path
from tersor.graph.plain_network import unwrapped
from tersor.models.cifar_resnet import DEPTHS, CifarResNet
from tersor.models.libraries import from_library, from_torchvision, is_of_library
from tersor.models.unet import UNet
from tersor.models.wide_plain import WIDE_PLAIN, WidePlain
from tersor.models.wide_resnet import FOURFOLD_RESNETS, WIDE_RESNETS, FourfoldResNet, WideResNet

CIFAR_RESNETS = {f"resnet{depth}": depth for depth in DEPTHS}


def names() -> list[str]:
    """Return the names that `build` accepts: networks for CIFAR, a UNet, torchvision's classification networks."""
    from torchvision import models  # imported here because it takes seconds

    return [*CIFAR_RESNETS, *FOURFOLD_RESNETS, *WIDE_RESNETS, *WIDE_PLAIN, "unet", *models.list_models(module=models)]


def build(name: str, num_classes: int | None = None, *, channels: int = 3) -> nn.Module:
    """Build a network with random weights.

    Args:
        name: a network for CIFAR (`resnet20`, 32, 44, 56, 110, `resnet8x4`, `wrn_16_2`, `wide_plain_64`), `unet` for
            segmentation, a torchvision network (`resnet18`, `mobilenet_v2`), a network of another library
            (`timm:resnet18`, see `libraries.py`), or `package.module:function`, which is called with `num_classes` if
            it accepts that, and returns a network.
        num_classes: number of logits; None for the network's own (10 for CIFAR, 11 for `unet`, 1000 in torchvision).
        channels: number of image channels; only `wide_plain_...` accepts numbers other than 3, others ignore it.

    Raises:
        InputError: the name is unknown, or the function cannot be imported or does not return a network.
    """
    if num_classes is not None and num_classes < 1:
        raise InputError(f"num_classes is {num_classes}. Write 1 or more.")
    options = {} if num_classes is None else {"num_classes": num_classes}
    if is_of_library(name):
        return from_library(name, num_classes)
    if is_function_path(name):
        return _from_function(name, options)
    if name in CIFAR_RESNETS:
        return CifarResNet(CIFAR_RESNETS[name], **options)
    if name in FOURFOLD_RESNETS:
        return FourfoldResNet(FOURFOLD_RESNETS[name], **options)
    if name in WIDE_RESNETS:
        return WideResNet(*WIDE_RESNETS[name], **options)
    if name == "unet":
        return UNet(**options)
    if name in WIDE_PLAIN:
        return WidePlain(*WIDE_PLAIN[name], **options, channels=channels)
    known = names()
    if name not in known:
        raise unknown("model", name, known, "a function that returns the network")
    return from_torchvision(name, num_classes)


def ignores_num_classes(name: str) -> bool:
    """Whether `name` is a user-defined function without an argument `num_classes`."""
    of_user = is_function_path(name) and not is_of_library(name)
    return of_user and not accepts(import_function(name), "num_classes")


def _from_function(path: str, options: dict[str, int]) -> nn.Module:
    model = call_with(path, import_function(path), **options)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"'{path}' returned a value of type {type(model).__name__}. "
            "Write a function that returns a torch.nn.Module."
        )
    return unwrapped(model)
