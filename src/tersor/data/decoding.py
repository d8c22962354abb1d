"""A file, or what somebody's data set hands out -> RGB pixels (H, W, 3) uint8."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tersor.core.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

# Pillow would open more by its content whatever the name is: PostScript, for one, which it lets Ghostscript execute
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")


def read_file(path: str, image_size: int | None) -> NDArray[np.uint8]:
    """The pixels of an image file; of a film, the first frame. EXIF rotation is left alone, as in torchvision.

    Args:
        path: the file.
        image_size: as in `rgb`.

    Raises:
        InputError: no such file, not an image, truncated, or of more than 8 bits a channel.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image_size is not None:
                # a JPEG decodes at a half, a quarter or an eighth of its size, which is faster by about as much;
                # from four times the wanted size on, no pixel differs by more than a level or two
                image.draft(None, (4 * image_size, 4 * image_size))
            image.load()
    except UnidentifiedImageError as error:
        raise InputError(f"'{path}' is not an image of a kind that can be read. Replace or remove it.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"'{path}': {error} Make it smaller or remove it.") from error
    except MemoryError as error:
        raise InputError(f"'{path}' takes more memory than there is. Make it smaller or remove it.") from error
    except Exception as error:  # by format and byte, Pillow raises about anything for broken files
        reason = str(error)[:200] or type(error).__name__
        raise InputError(f"'{path}' cannot be decoded: {reason}. Replace or remove it.") from error
    return rgb(image, image_size, f"'{path}'")


def rgb(image: object, image_size: int | None, name: str) -> NDArray[np.uint8]:
    """The pixels of one image; transparency is dropped.

    Args:
        image: a Pillow image, or a uint8 tensor (3, H, W) or (1, H, W).
        image_size: the shorter side is resized to this many pixels (bilinear), then the centre is cropped to a
            square; None for the size it has.
        name: what to call it in an error.

    Raises:
        InputError: it is something else, or of more than 8 bits a channel.
    """
    if isinstance(image, Tensor):
        image = _from_tensor(image, name)
    if not isinstance(image, Image.Image):
        raise InputError(f"{name} is of type {type(image).__name__}. Give a PIL image or a uint8 tensor (3, H, W).")
    if image.mode.startswith(("I", "F")):
        raise InputError(f"{name} has more than 8 bits a channel (Pillow mode '{image.mode}'). Convert it to 8.")
    if image.mode != "RGB":
        try:
            image = image.convert("RGB")
        except ValueError as error:
            raise InputError(f"{name} has Pillow's mode '{image.mode}', which does not become RGB: {error}.") from error
    if image_size is not None and image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)


def _from_tensor(image: Tensor, name: str) -> Image.Image:
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] not in {1, 3} or not image.numel():
        raise InputError(
            f"{name} is a tensor {tuple(image.shape)} of {image.dtype}. Give a PIL image or a uint8 tensor (3, H, W), "
            "before any normalisation."
        )
    return Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
