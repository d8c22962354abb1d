"""A network is run on images that somebody gave."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import Tensor

from tersor.core.errors import InputError


@contextmanager
def fed(name: str, images: Tensor) -> Generator[None]:
    """While the network called `name` runs on `images` (N, C, H, W) for the first time.

    Raises:
        InputError: it does not: of other channels, another size, another precision; or they hold NaN or infinity.
    """
    if not images.isfinite().all():
        raise InputError(f"images for {name} hold NaN or infinity. Give finite ones.")
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        kind = str(images.dtype).removeprefix("torch.")
        raise InputError(
            f"{name} does not run on images {tuple(images.shape[1:])} of {kind}: "
            f"{str(error).splitlines()[0].rstrip('.')}. Give images as the network wants them."
        ) from error
