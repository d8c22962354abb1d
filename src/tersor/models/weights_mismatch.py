"""Weights of one network, another network: what differs, and what was probably meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.models.cifar_resnet import DEPTHS, CifarResNet

_SHOWN = 4


class OtherClasses(InputError):  # noqa: N818 - what differs, not that it is an error
    """The file is of the same network, with `in_file` classes and not as many as the network has."""

    def __init__(self, path: str, in_file: int, here: int) -> None:
        super().__init__(
            f"'{path}': the file has {in_file} classes, num_classes is {here}. "
            f"Write num_classes: {in_file}, or give weights for {here} classes."
        )
        self.in_file = in_file


def is_counter(key: str) -> bool:
    """Whether `key` is BatchNorm's count of batches, which old files lack."""
    return key.endswith("num_batches_tracked")


def mismatch(path: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Any]) -> InputError | None:
    """An error if the file's `tensors` are not those of the network whose `state_dict` is `expected`."""
    missing = [key for key in expected if key not in tensors and not is_counter(key)]
    unexpected = [key for key in tensors if key not in expected]
    reshaped = [key for key in expected if key in tensors and tensors[key].shape != expected[key].shape]
    if not (missing or unexpected or reshaped):
        return None
    if not (missing or unexpected):
        classes = _classes(reshaped, tensors, expected)
        if classes is not None:
            return OtherClasses(path, *classes)
    shapes = [f"{key} ({_shape(tensors[key])} in the file, {_shape(expected[key])} here)" for key in reshaped]
    parts = [
        f"{len(keys)} {what}: {', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''}."
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    advice = _meant(tensors) if missing or unexpected else ""
    if any("parametrizations." in key for key in unexpected):
        advice = " Before saving, call torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')."
    return InputError(f"'{path}' holds the weights of another network. {' '.join(parts)}{advice}")


def _classes(
    reshaped: Iterable[str], tensors: Mapping[str, Tensor], expected: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Classes in the file and in the network, if nothing but the last layer's number of outputs differs."""
    last = [*expected][-1].rpartition(".")[0]
    for key in reshaped:
        if key.rpartition(".")[0] != last or tensors[key].shape[1:] != expected[key].shape[1:]:
            return None
    return len(tensors[f"{last}.weight"]), len(expected[f"{last}.weight"])


def _shape(tensor: Tensor) -> str:
    return "x".join(str(length) for length in tensor.shape) or "a number"


def _meant(tensors: Mapping[str, Tensor]) -> str:
    """The CIFAR ResNet that the file was made for, in words; empty if it is none of them."""
    found = {key for key in tensors if not is_counter(key)}
    if "linear.weight" not in found:
        return ""
    for depth in DEPTHS:
        if found == _keys(depth):
            classes = len(tensors["linear.weight"])
            return f" The file fits resnet{depth} with num_classes: {classes}."
    return ""


@cache
def _keys(depth: int) -> set[str]:
    """Of the CIFAR ResNet of a depth; to build all of them takes seconds."""
    with torch.device("meta"):
        return {key for key in CifarResNet(depth).state_dict() if not is_counter(key)}
