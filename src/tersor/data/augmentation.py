"""Random changes to batches of uint8 images that keep their labels valid."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from tersor.core.errors import InputError, unknown
from tersor.core.import_path import import_function, is_function_path

Named = Literal["none", "flip", "crop_flip"]
NAMES: tuple[str, ...] = get_args(Named)
Transform = Callable[[Tensor], Any]
Augmentation = str | Sequence[str | Mapping[str, Mapping[str, Any] | None]] | Transform
"""A name; "package.module:function"; classes of torchvision.transforms.v2 with their arguments; or a callable."""

_FORMS = (
    f"Possible: {', '.join(NAMES)}; package.module:function; or a list of torchvision.transforms.v2, such as "
    "[{RandomCrop: {size: 32, padding: 4}}, RandomHorizontalFlip]."
)


def resolve(augmentation: Augmentation) -> Named | Transform:
    """Return the name, or the callable that `augmentation` describes.

    Raises:
        InputError: there is no such name, function or transform, or a transform does not accept its arguments.
    """
    if isinstance(augmentation, str):
        if is_function_path(augmentation):
            return import_function(augmentation)
        if augmentation not in NAMES:
            raise unknown("augmentation", augmentation, [*NAMES, "package.module:function"])
        return cast("Named", augmentation)
    return augmentation if callable(augmentation) else _composed(augmentation)


def augmented(pixels: Tensor, augmentation: Named | Transform, draw: torch.Generator) -> Tensor:
    """Augment a batch.

    `flip` mirrors half of the images. `crop_flip` also shifts each by up to an eighth of its size, padded by
    reflection. Transforms of torchvision are called for each image, because one call draws one set of random numbers;
    any other callable gets the whole batch. Both may draw from torch's global CPU generator, which is seeded for each
    batch and restored.

    Args:
        pixels: (B, H, W, 3) uint8, contiguous; may be overwritten.
        augmentation: what `resolve` returns.
        draw: the generator of this batch.

    Returns:
        (B, H, W, 3) uint8, contiguous.

    Raises:
        InputError: a transform fails, or its result differs from its input in shape or data type.
    """
    if callable(augmentation):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw.initial_seed())  # torch.manual_seed would seed GPUs as well
            images = _transformed(pixels.permute(0, 3, 1, 2), augmentation)
        return images.permute(0, 2, 3, 1).contiguous()
    if augmentation == "none":
        return pixels
    batch, height, width, channels = pixels.shape
    flips = torch.rand(batch, 1, generator=draw) < 0.5
    rows = torch.arange(height).expand(batch, height)
    columns = torch.where(flips, torch.arange(width).flip(0), torch.arange(width))
    if augmentation == "crop_flip":
        rows = _reflected(rows + _shifts(batch, height // 8, draw), height)
        columns = _reflected(columns + _shifts(batch, width // 8, draw), width)
    # pad, crop and flip as one gather of pixels
    index = (torch.arange(batch)[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
    return pixels.view(-1, channels).index_select(0, index.flatten()).view(pixels.shape)


def _shifts(batch: int, limit: int, draw: torch.Generator) -> Tensor:
    return torch.randint(-limit, limit + 1, (batch, 1), generator=draw)


def _reflected(index: Tensor, length: int) -> Tensor:
    """Reflect indices outside [0, length) at the edge, which is not repeated."""
    return (length - 1) - ((length - 1) - index.abs()).abs()


def _transformed(images: Tensor, transform: Transform) -> Tensor:
    """Images (B, 3, H, W) -> the same shape and data type."""
    if not any(cls.__module__.startswith("torchvision.transforms") for cls in inspect.getmro(type(transform))):
        return _checked(transform(images), images, transform)
    try:
        results = [transform(image) for image in images]
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, NotImplementedError) as error:
        raise InputError(f"the augmentation {transform} failed: {error}") from error
    return torch.stack([_checked(result, image, transform) for result, image in zip(results, images, strict=True)])


def _checked(result: Any, before: Tensor, transform: Transform) -> Tensor:
    if not isinstance(result, Tensor):
        described = f"a {type(result).__name__}"
    elif result.shape == before.shape and result.dtype == before.dtype:
        return result
    else:
        described = f"a tensor {tuple(result.shape)} of {result.dtype}"
    raise InputError(
        f"the augmentation {getattr(transform, '__name__', transform)} returned {described} for images "
        f"{tuple(before.shape)} of {before.dtype}. Keep shape and data type: images are resized before augmentation "
        "(image_size) and normalized after it."
    )


def _composed(entries: Any) -> Transform:
    """The transforms of a list, one after the other."""
    from torchvision.transforms import v2  # imported here because it takes seconds

    if not isinstance(entries, list | tuple) or not entries:
        raise InputError(f"augment is {entries!r}. {_FORMS}")
    return v2.Compose([_built(entry) for entry in cast("Sequence[Any]", entries)])


def _built(entry: Any) -> Transform:
    """`RandomHorizontalFlip` or `{RandomCrop: {size: 32}}` -> the transform; a callable stays."""
    from torchvision.transforms import v2

    if callable(entry):
        return entry
    pair = {entry: None} if isinstance(entry, str) else entry
    if not isinstance(pair, dict) or len(cast("dict[Any, Any]", pair)) != 1:
        raise InputError(f"augment has the entry {entry!r}. {_FORMS}")
    [(name, given)] = cast("dict[str, dict[str, Any] | None]", pair).items()
    classes = {key: value for key, value in vars(v2).items() if inspect.isclass(value)}
    transforms = {key: cls for key, cls in classes.items() if issubclass(cls, v2.Transform) and cls is not v2.Transform}
    if name not in transforms:
        raise unknown("transform of torchvision.transforms.v2", name, transforms)
    arguments = {key: _argument(key, value) for key, value in (given or {}).items()}
    try:
        return transforms[name](**arguments)
    except (TypeError, ValueError) as error:
        parameters = ", ".join(inspect.signature(transforms[name]).parameters)
        raise InputError(f"augment: {name} does not accept {given or {}}: {error}. Possible: {parameters}.") from error


def _argument(name: str, value: Any) -> Any:
    """Arguments that YAML cannot express: the transforms of `RandomApply` and the like, and data types."""
    if name == "transforms" and isinstance(value, list):
        return [_built(entry) for entry in cast("list[Any]", value)]
    if name == "dtype" and isinstance(getattr(torch, str(value), None), torch.dtype):
        return getattr(torch, value)
    return value
