"""Random changes to batches of images and their targets: masks and boxes are transformed with the images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from tersor.core.device import seeded
from tersor.core.errors import InputError, missing_in, unknown
from tersor.core.import_path import import_function, is_function_path
from tersor.core.user_code import user_code

Named = Literal["none", "flip", "crop_flip"]
NAMES: tuple[str, ...] = get_args(Named)
Transform = Callable[..., Any]
Augmentation = str | Sequence[str | Mapping[str, Mapping[str, Any] | None]] | Transform
"""A name; "package.module:function"; classes of torchvision.transforms.v2 with their arguments; or a callable."""

_LARGEST = 2**16 - 1

_MEANINGS = {
    "flip": "half of the images are mirrored",
    "crop_flip": "half of the images are mirrored, and every image is shifted by up to an eighth of its size",
}
_FORMS = (
    f"Possible: {', '.join(NAMES)}; package.module:function; or a list of classes of torchvision.transforms.v2, such "
    "as [{RandomCrop: {size: 32, padding: 4}}, RandomHorizontalFlip]."
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
            raise unknown(
                "augmentation", augmentation, [*NAMES, "package.module:function"], "a function of a batch of images"
            )
        return cast("Named", augmentation)
    return augmentation if callable(augmentation) else _composed(augmentation)


def described(augmentation: Augmentation) -> str:
    """ "flip (half of the images are mirrored)": the augmentation as shown to the user."""
    if isinstance(augmentation, str):
        meaning = _MEANINGS.get(augmentation)
        return f"{augmentation} ({meaning})" if meaning else augmentation
    if callable(augmentation):
        return getattr(augmentation, "__name__", type(augmentation).__name__)
    return ", ".join(each if isinstance(each, str) else next(iter(each)) for each in augmentation)


def augmented(
    pixels: Tensor, targets: Any, augmentation: Named | Transform, draw: torch.Generator
) -> tuple[Tensor, Any]:
    """Augment a batch.

    `flip` mirrors half of the images. `crop_flip` also shifts each by up to an eighth of its size, padded by
    reflection. Transforms of torchvision are called for each image and its mask or boxes, because one call draws one
    set of random numbers. Boxes that leave the image are dropped. Images with 16 bits are passed to the transforms as
    float32 from 0 to 1. Any other callable gets the whole batch: the images, and the targets too if they are masks or
    boxes. Both may draw from torch's global CPU generator, which is seeded for each batch and restored.

    Args:
        pixels: (B, H, W, C) uint8 or uint16, contiguous; may be overwritten.
        targets: targets of the batch: masks (B, H, W) and lists of boxes are augmented, others stay as they are.
        augmentation: what `resolve` returns.
        draw: the generator of this batch.

    Returns:
        Pixels (B, H, W, C) of the same data type, contiguous; and the targets.

    Raises:
        InputError: a transform fails, its result differs from its input in shape or data type, or it cannot transform
            boxes.
    """
    if callable(augmentation):
        with seeded(draw.initial_seed()):
            images, targets = _transformed(pixels.permute(0, 3, 1, 2), targets, augmentation)
        return images.permute(0, 2, 3, 1).contiguous(), targets
    if augmentation == "none":
        return pixels, targets
    if augmentation == "crop_flip" and _are_boxes(targets):
        raise InputError(
            "augment is crop_flip, which pads images by reflection, so that objects without boxes can appear. "
            "Write flip. In a recipe or in Python, a list is also possible, such as [RandomHorizontalFlip, "
            "RandomIoUCrop, {Resize: {size: [64, 64]}}]."
        )
    batch, height, width, channels = pixels.shape
    flips = torch.rand(batch, 1, generator=draw) < 0.5
    rows = torch.arange(height).expand(batch, height)
    columns = torch.where(flips, torch.arange(width).flip(0), torch.arange(width))
    if augmentation == "crop_flip":
        rows = _reflected(rows + _shifts(batch, height // 8, draw), height)
        columns = _reflected(columns + _shifts(batch, width // 8, draw), width)
    # pad, crop and flip as one gather of pixels
    index = ((torch.arange(batch)[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]).flatten()
    moved = pixels.view(-1, channels).index_select(0, index).view(pixels.shape)
    if _are_masks(targets, pixels):
        return moved, targets.flatten().index_select(0, index).view(targets.shape)
    if _are_boxes(targets):
        return moved, [_mirrored(one, width) if flip else one for one, flip in zip(targets, flips, strict=True)]
    return moved, targets


def _are_masks(targets: Any, pixels: Tensor) -> bool:
    return isinstance(targets, Tensor) and targets.shape == pixels.shape[:3]


def _are_boxes(targets: Any) -> bool:
    return isinstance(targets, list) and all(
        isinstance(one, dict) and "boxes" in one for one in cast("list[Any]", targets)
    )


def _mirrored(target: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    left, top, right, bottom = target["boxes"].unbind(1)
    return target | {"boxes": torch.stack([width - right, top, width - left, bottom], 1)}


def _shifts(batch: int, limit: int, draw: torch.Generator) -> Tensor:
    return torch.randint(-limit, limit + 1, (batch, 1), generator=draw)


def _reflected(index: Tensor, length: int) -> Tensor:
    """Reflect indices outside [0, length) at the edge, which is not repeated."""
    return (length - 1) - ((length - 1) - index.abs()).abs()


def _transformed(images: Tensor, targets: Any, transform: Transform) -> tuple[Tensor, Any]:
    """Images (B, C, H, W) and targets -> the same shapes and data types."""
    masks, boxes = _are_masks(targets, images[:, 0]), _are_boxes(targets)
    if not any(cls.__module__.startswith("torchvision.transforms") for cls in inspect.getmro(type(transform))):
        with user_code(f"the augmentation {getattr(transform, '__name__', transform)}", transform):
            returned: Any = transform(images, targets) if masks or boxes else transform(images)
        if not masks and not boxes:
            return _checked(returned, images, transform), targets
        if not isinstance(returned, tuple) or len(cast("tuple[Any, ...]", returned)) != 2:
            raise InputError(
                f"the augmentation {getattr(transform, '__name__', transform)} returned an object of type "
                f"{type(returned).__name__}. Return images and targets: masks and boxes must be transformed together "
                "with the images."
            )
        moved, after = cast("tuple[Any, Any]", returned)
        return _checked(moved, images, transform), _checked(after, targets, transform) if masks else after
    if images.dtype == torch.uint16:  # torch has no operators for it that transforms need, before 2.14 not even flip
        moved, after = _transformed(images / _LARGEST, targets, transform)
        return (moved.clamp(0, 1) * _LARGEST).round().to(torch.uint16), after
    try:
        if masks:
            pairs = [_with_mask(image, mask, transform) for image, mask in zip(images, targets, strict=True)]
        elif boxes:
            pairs = [_with_boxes(image, target, transform) for image, target in zip(images, targets, strict=True)]
        else:
            pairs = [(transform(image), None) for image in images]
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, NotImplementedError) as error:
        raise InputError(f"the augmentation {transform} failed: {error}") from error
    results, after = zip(*pairs, strict=True) if pairs else ((), ())
    stacked = torch.stack([_checked(result, image, transform) for result, image in zip(results, images, strict=True)])
    return stacked, torch.stack(after) if masks else [*after] if boxes else targets


def _with_mask(image: Tensor, mask: Tensor, transform: Transform) -> tuple[Tensor, Tensor]:
    from torchvision import tv_tensors  # imported here because it takes seconds

    moved, after = transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
    return _plain(moved), _plain(after)


def _with_boxes(image: Tensor, target: dict[str, Tensor], transform: Transform) -> tuple[Tensor, dict[str, Tensor]]:
    """An image and its boxes after the transform; boxes of less than a pixel are dropped."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    height, width = image.shape[-2:]
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(height, width))  # pyright: ignore[reportCallIssue]
    moved, after = v2.SanitizeBoundingBoxes()(*transform(tv_tensors.Image(image), target | {"boxes": boxes}))
    return _plain(moved), {key: _plain(value) for key, value in after.items()}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)


def _checked(result: Any, before: Tensor, transform: Transform) -> Tensor:
    if not isinstance(result, Tensor):
        described = f"an object of type {type(result).__name__}"
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
    """The transforms of a list, one after another."""
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
        raise missing_in("torchvision.transforms.v2", "transform", name, transforms)
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
