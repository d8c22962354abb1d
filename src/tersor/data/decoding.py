"""Decode image files, and images of other data sets, to RGB pixels (H, W, 3) uint8."""

# Pillow as in torchvision, but not torchvision's pil_loader, which accepts every format and ignores draft().

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tersor.core.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

# Pillow detects formats by content, whatever the file's name, and would let Ghostscript execute PostScript
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")


def read_file(path: str, image_size: int | None) -> NDArray[np.uint8]:
    """Decode an image file; of an animation, the first frame. EXIF rotation is ignored, as in torchvision.

    Args:
        path: the file.
        image_size: as in `rgb`.

    Raises:
        InputError: the file does not exist, is not an image, is truncated, or has more than 8 bits per channel.
    """
    if not Path(path).is_file():  # opening a named pipe would wait forever
        raise InputError(f"'{path}' does not exist or is not a regular file. Replace or remove it.")
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image_size is not None:
                # a JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, which is faster by about as much; at four times
                # the target size or more, pixels differ by one or two levels at most
                image.draft(None, (4 * image_size, 4 * image_size))
            image.load()
    except UnidentifiedImageError as error:
        raise InputError(f"'{path}' is not an image in a supported format. Replace or remove it.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"'{path}': {error} Make it smaller or remove it.") from error
    except MemoryError as error:
        raise InputError(f"there is not enough memory for '{path}'. Make it smaller or remove it.") from error
    except Exception as error:  # Pillow raises almost any exception for damaged files
        reason = str(error)[:200] or type(error).__name__
        raise InputError(f"'{path}' cannot be decoded: {reason}. Replace or remove it.") from error
    return rgb(image, image_size, f"'{path}'")


def rgb(image: object, image_size: int | None, name: str) -> NDArray[np.uint8]:
    """Convert an image to RGB pixels; transparency is dropped.

    Args:
        image: a Pillow image, or a uint8 tensor (3, H, W) or (1, H, W).
        image_size: the shorter side is resized to this many pixels (bilinear) and the centre is cropped to a square;
            None keeps the size.
        name: of the image, in errors.

    Raises:
        InputError: the image is of another type, or has more than 8 bits per channel.
    """
    if isinstance(image, Tensor):
        image = _from_tensor(image, name)
    if not isinstance(image, Image.Image):
        raise InputError(f"{name} is of type {type(image).__name__}. Pass a PIL image or a uint8 tensor (3, H, W).")
    if image.mode.startswith(("I", "F")):
        raise InputError(f"{name} has more than 8 bits per channel (Pillow mode '{image.mode}'). Convert it to 8 bits.")
    if image.mode != "RGB":
        try:
            image = image.convert("RGB")
        except ValueError as error:
            raise InputError(
                f"{name} has Pillow mode '{image.mode}', which has no conversion to RGB: {error}."
            ) from error
    if image_size is not None and image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)


def _from_tensor(image: Tensor, name: str) -> Image.Image:
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] not in {1, 3} or not image.numel():
        raise InputError(
            f"{name} is a tensor {tuple(image.shape)} of {image.dtype}. Pass a PIL image or a uint8 tensor (3, H, W) "
            "that is not normalized."
        )
    return Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
