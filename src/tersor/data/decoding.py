"""Decode image files, and images of other data sets, to pixels (H, W, C) of 8 or 16 bits."""

# Pillow as in torchvision, but not torchvision's pil_loader, which accepts every format and ignores draft().

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tersor.core.errors import InputError, counted

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Number of channels -> Pillow's mode of the images that files hold."""

# Pillow detects formats by content, whatever the file's name, and would let Ghostscript execute PostScript
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")


@dataclass(frozen=True)
class ImageFormat:
    """What every image of a data set is converted to.

    Attributes:
        size: height and width in pixels; None keeps the size.
        channels: 3 for RGB, 1 for gray, 4 for RGBA (a file with four channels of another kind keeps them).
        crop: whether the image is resized until it covers `size` and is then center-cropped. Otherwise it is resized to
            exactly `size`, which can change the aspect ratio but cuts nothing off a mask or a box.
    """

    size: tuple[int, int] | None = None
    channels: int = 3
    crop: bool = True


def read_file(path: str, form: ImageFormat) -> NDArray[Any]:
    """Decode an image file to `form`. EXIF rotation is ignored, as in torchvision.

    Raises:
        InputError: the file does not exist, is not an image, is truncated, or cannot be converted.
    """
    return pixels_of(open_image(path, form.size), form, f"'{path}'")


def open_image(path: str, size: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image file, or the first frame of an animation. A JPEG may be decoded smaller, at four times `size`.

    Raises:
        InputError: the file does not exist, is not an image, or is truncated.
    """
    with _open(path) as image:
        if size is not None:
            # a JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, which is faster by about as much; at four times the
            # target size or more, pixels differ by one or two levels at most
            image.draft(None, (4 * size[1], 4 * size[0]))
        image.load()
    return image


@contextmanager
def _open(path: str) -> Generator[Image.Image]:
    if not Path(path).is_file():  # opening a named pipe would wait forever
        raise InputError(
            f"'{path}' does not exist or is not a regular file. Add the file, or remove the entry that refers to it."
        )
    try:
        with Image.open(path, formats=_FORMATS) as image:
            yield image
    except UnidentifiedImageError as error:
        raise InputError(f"'{path}' is not an image in a supported format. Replace or remove it.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"'{path}': {error} Make it smaller or remove it.") from error
    except MemoryError as error:
        raise InputError(f"there is not enough memory for '{path}'. Make it smaller or remove it.") from error
    except Exception as error:  # Pillow raises almost any exception for damaged files
        reason = str(error)[:200] or type(error).__name__
        raise InputError(f"'{path}' cannot be decoded: {reason}. Replace or remove it.") from error


def size_of(path: str) -> tuple[int, int]:
    """Height and width of an image file, whose pixels are not decoded.

    Raises:
        InputError: the file does not exist or is not an image.
    """
    with _open(path) as image:
        return image.height, image.width


def pixels_of(image: object, form: ImageFormat, name: str) -> NDArray[Any]:
    """Convert an image to pixels (H, W, C) uint8, or uint16 if it has 16 bits per channel.

    Resizing is bilinear. With one or three channels, transparency is dropped. Pillow reads a file of 16 bits per
    channel as 8 bits if it has color.

    Args:
        image: a Pillow image, or a uint8 or uint16 tensor (C, H, W); one channel is repeated.
        form: size and channels of the result.
        name: name of the image in error messages.

    Raises:
        InputError: the image is of another type, or cannot be converted.
    """
    layers = _layers(image, form.channels, name)
    if form.size is not None:
        layers = [_resized(layer, form.size, form.crop) for layer in layers]
    pixels = [np.asarray(layer).reshape(layer.height, layer.width, -1) for layer in layers]
    joined = pixels[0] if len(pixels) == 1 else np.concatenate(pixels, axis=2)
    if joined.shape[2] == 1 < form.channels:
        joined = joined.repeat(form.channels, axis=2)
    return np.rint(joined).astype(np.uint16) if joined.dtype == np.float32 else joined


def mask_of(image: object, size: tuple[int, int] | None, name: str) -> NDArray[np.uint8]:
    """Convert a mask to class indices (H, W), resized to `size` (height, width) by nearest-neighbor interpolation.

    Args:
        image: a palette or gray Pillow image, or an integer tensor or array (H, W), whose values are class indices.
        size: height and width; None keeps the size.
        name: name of the mask in error messages.

    Raises:
        InputError: the mask is of another kind, or has values outside 0..255.
    """
    if isinstance(image, Image.Image):
        if image.mode not in {"P", "L", "1", "I;16", "I"}:
            raise InputError(
                f"{name} is a mask of Pillow mode '{image.mode}'. Possible: a palette or grayscale image whose values "
                "are class indices. Convert colors to class indices."
            )
        image = np.asarray(image)
    values: NDArray[Any] = np.asarray(image)
    if values.ndim != 2 or values.dtype.kind not in "iub" or not values.size:
        raise InputError(
            f"{name} is a mask {values.shape} of {values.dtype}. Possible: class indices (H, W), integers from 0."
        )
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 255:
        raise InputError(
            f"{name} has class indices from {low} to {high}. Possible: 0 to 254, and 255 for pixels to ignore."
        )
    numbers = np.ascontiguousarray(values, dtype=np.uint8)
    if size is None or numbers.shape == size:
        return numbers
    return np.asarray(Image.fromarray(numbers).resize((size[1], size[0]), Image.Resampling.NEAREST))


def _layers(image: object, channels: int, name: str) -> list[Image.Image]:
    """Pillow images whose channels, one after another, are those of `image`: RGB, gray, or float32 for 16 bits."""
    if isinstance(image, Tensor):
        return _layers_of_tensor(image, channels, name)
    if not isinstance(image, Image.Image):
        raise InputError(f"{name} is of type {type(image).__name__}. Pass a PIL image or a uint8 tensor (C, H, W).")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if not 0 <= int(values.min()) <= int(values.max()) < 2**16:
            raise InputError(f"{name} has more than 16 bits per channel. Convert it to 16 or 8 bits.")
        return [Image.fromarray(values.astype(np.float32))]
    if channels not in MODES or image.mode.startswith("F"):
        raise InputError(
            f"{name} has Pillow mode '{image.mode}', and channels is {channels}. Possible: images of 8 or "
            f"16 bits per channel, and {', '.join(map(str, MODES))} channels; a data set of tensors (C, H, W) may have "
            "any number."
        )
    if channels == 4 == len(image.getbands()):
        return list(image.split())  # Pillow would weight the first three by the fourth while resizing
    try:
        converted = image if image.mode == MODES[channels] else image.convert(MODES[channels])
    except ValueError as error:
        raise InputError(
            f"{name} has Pillow mode '{image.mode}', which cannot be converted: {error}. Save it as RGB or grayscale."
        ) from error
    return list(converted.split()) if channels == 4 else [converted]


def _layers_of_tensor(image: Tensor, channels: int, name: str) -> list[Image.Image]:
    deep = image.dtype == torch.uint16
    if not (deep or image.dtype == torch.uint8) or image.dim() != 3 or not image.numel():
        remedy = " For values in [0, 1]: (image * 255).round().to(torch.uint8)." if image.is_floating_point() else ""
        raise InputError(
            f"{name} is a tensor {tuple(image.shape)} of {image.dtype}. Pass a PIL image or a uint8 or uint16 tensor "
            f"(C, H, W) that is not normalized.{remedy}"
        )
    if image.shape[0] not in {1, channels}:
        raise InputError(
            f"{name} is a tensor {tuple(image.shape)} with {counted(image.shape[0], 'channel')}, but channels is "
            f"{channels}. Write channels: {image.shape[0]}."
        )
    bands = image.numpy()
    if not deep and channels == 3 == len(bands):
        return [Image.fromarray(np.ascontiguousarray(bands.transpose(1, 2, 0)))]
    return [Image.fromarray(band.astype(np.float32) if deep else np.ascontiguousarray(band)) for band in bands]


def _resized(image: Image.Image, size: tuple[int, int], crop: bool) -> Image.Image:
    wanted = (size[1], size[0])
    if image.size == wanted:
        return image
    return (
        ImageOps.fit(image, wanted, Image.Resampling.BILINEAR)
        if crop
        else image.resize(wanted, Image.Resampling.BILINEAR)
    )
