"""Running a network in eval mode, and on images that may not fit it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from tersor.core.errors import InputError
from tersor.data.batch import images_of
from tersor.data.network_inputs import NetworkInput, TensorInputs, tensors_of
from tersor.graph.forward_call import run, specs_of
from tersor.tasks.network_outputs import named_entries

_CHANNELS = re.compile(r"expected input\[[\d, ]*\] to have (\d+) channels, but got (\d+) channels")
_LOW_PRECISION = re.compile(r"BFloat16|Half|bfloat16|float16")
_FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AssertionError, KeyError, AttributeError)
_SQUEEZED = "its forward method squeezes the batch dimension. Write x.flatten(1) or x.squeeze((2, 3)), not x.squeeze()."
_OTHER_IMAGES = "Pass images that the network accepts."
_CONVERTED = (
    "The weights are in float32 here. Remove conversions to another precision, such as x.bfloat16(), from the forward "
    "method: in training, autocast lowers the precision, and each runtime has a default precision."
)
_CAPTURED = "It was captured for the size of the first images, so all images must have that size."


@contextmanager
def modes_restored(model: nn.Module) -> Generator[None]:
    """Context that restores the mode of each module at its end, including those frozen by hand."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Context in eval mode; it restores the mode of each module at its end."""
    with modes_restored(model):
        model.eval()
        yield


@contextmanager
def checked_forward(name: str, images: NetworkInput, *, captured: bool = False) -> Generator[None]:
    """Explains the failure when the network `name`, or its captured graph, first runs on `images` (N, C, H, W).

    Raises:
        InputError: the network does not accept the channels, size or precision of the images, or they hold NaN or
            infinity.
    """
    if any(each.is_meta for each in tensors_of(images)):
        raise InputError(f"images for {name} are on the meta device and have no values. Pass images on the CPU.")
    if not all(bool(each.isfinite().all()) for each in tensors_of(images)):
        raise InputError(f"images for {name} hold NaN or infinity. Pass finite images.")
    try:
        yield
    except InputError:
        raise
    except _FAILURES as error:
        reason = _reason(error)
        if isinstance(images, TensorInputs):
            raise InputError(
                f"{name} does not run on the inputs {_described(images)}: {reason}. Pass the inputs of its forward "
                "method in order, or by name: (left, right) or {'left': left, 'right': right}. In a batch, the targets "
                "follow: ((left, right), targets)."
            ) from error
        details, advice = _on_images(images, reason)
        if captured and advice == _OTHER_IMAGES:
            name, advice = f"the captured graph of {name}", _CAPTURED
        raise InputError(f"{name} does not run on images {tuple(images.shape[1:])}{details}. {advice}") from error


def _on_images(images: Tensor, reason: str) -> tuple[str, str]:
    """What went wrong with these images, and what to do."""
    if found := _CHANNELS.search(reason):
        if images.shape[3] == int(found[1]):
            return "", "These have their channels last: pass images.permute(0, 3, 1, 2)."
        advice = f"It takes images (N, {found[1]}, H, W), but these are (N, {found[2]}, H, W)."
        if images.shape[1] == 3:
            advice += (
                f" If tersor loads the images, write --channels {found[1]} for `tersor compress`, "
                f"data.channels: {found[1]} in a recipe, or channels={found[1]} in Python."
            )
        return "", advice
    details = f" of {str(images.dtype).removeprefix('torch.')}: {reason}"
    low = images.dtype == torch.float32 and _LOW_PRECISION.search(reason)
    return details, _CONVERTED if low else _OTHER_IMAGES


@torch.no_grad()
def check_forward(name: str, network: nn.Module, images: NetworkInput) -> Any:
    """Run the network on two images and on one.

    Args:
        name: name of the network in error messages.
        network: a network in eval mode; the images are moved to its device.
        images: (N, C, H, W), or several tensors; the first two are used, or the first one twice.

    Returns:
        The outputs for two images.

    Raises:
        InputError: it does not run, needs another input, or drops the batch dimension of a single image.
    """
    required = required_inputs(network)
    if len(required) > 1 and isinstance(images, Tensor):
        raise InputError(
            f"the forward method of {name} needs {len(required)} inputs: {', '.join(required)}, but a batch has one. "
            f"To tersor.export, pass ({', '.join(required)}) as the example; to the other Python functions, batches "
            f"(({', '.join(required)}), targets). Or give the other inputs a default: recipes and `tersor compress` "
            "support only networks with one input, the images."
        )
    if not images.is_floating_point():
        raise InputError(f"images for {name} have the type {images.dtype}. Pass normalized floating-point images.")
    device = next((each.device for each in network.parameters()), images.device)
    two = images[:2] if len(images) > 1 else images[[0, 0]]
    with checked_forward(name, two):
        two = two.to(device)
        outputs = run(network, two.clone())  # a forward method may change its input in place
    try:
        of_one = run(network, two[:1].clone())
    except _FAILURES as error:
        raise InputError(
            f"{name} runs on two images, but not on one: {_reason(error)}. It must accept any number of images. "
            f"Possible reason: {_SQUEEZED}"
        ) from error
    for several, one in zip(tensors_in(outputs), tensors_in(of_one), strict=False):
        if one.ndim < several.ndim and several.shape[:1] == (2,):
            shapes = f"shape {tuple(several.shape)} for two images and {tuple(one.shape)} for one"
            raise InputError(f"{name} returns {shapes}: {_SQUEEZED}")
    return outputs


def _described(inputs: TensorInputs) -> str:
    """`left (3, 32, 32) of float32, right (8) of int64`."""
    return ", ".join(f"{each.name or ''} {each.shape} of {each.dtype}".lstrip() for each in specs_of(inputs))


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0].rstrip(".")


def required_inputs(model: nn.Module) -> list[str]:
    """The names of the inputs without a default."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return [each.name for each in parameters if each.default is each.empty and each.kind not in kinds]


def tensors_in(outputs: Any) -> list[Tensor]:
    """The tensors in the outputs of a network: a tensor, or those in a tuple, list, dict or dataclass."""
    if isinstance(outputs, Tensor):
        return [outputs]
    entries = named_entries(outputs)
    if entries is not None:
        outputs = list(entries.values())
    return [found for each in outputs for found in tensors_in(each)] if isinstance(outputs, list | tuple) else []


def only_tensors(outputs: Any) -> bool:
    """Whether the outputs are tensors, None, and containers of these, and nothing else."""
    entries = named_entries(outputs)
    if entries is not None:
        outputs = list(entries.values())
    if isinstance(outputs, list | tuple):
        return all(only_tensors(each) for each in cast("list[Any]", outputs))
    return outputs is None or isinstance(outputs, Tensor)


def first_images(data: Iterable[Any], images: int, device: torch.device) -> Iterator[NetworkInput]:
    """The first `images` of `data`, batch by batch (N, C, H, W), on `device`.

    Raises:
        InputError: a batch of images is not floating point.
    """
    left = images
    for batch in data:
        found = images_of(batch)[:left]
        if not found.is_floating_point():
            raise InputError(f"a batch of the data has the type {found.dtype}. Pass normalized floating-point images.")
        if len(found):
            yield found.to(device)
        left -= len(found)
        if left <= 0:
            return
