"""Mean and standard deviation of each channel, as a user gives them."""

from __future__ import annotations

from typing import Any, cast

import torch

from tersor.core.errors import InputError, counted

Channels = tuple[float, ...]
"""A number for each channel."""


def channel_values(name: str, given: object) -> Channels:
    """The numbers of a list, an array or a tensor, one for each channel.

    Args:
        name: name of the argument, "mean" or "std".
        given: what the user passed.

    Raises:
        InputError: it is a single number, or something other than numbers.
    """
    try:
        values = torch.as_tensor(cast("Any", given), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        values = None
    if values is None or values.ndim != 1:
        raise InputError(
            f"{name} is {given!r}. Write a list with one number for each channel, as in {name}=[0.49, 0.48, 0.45]."
        )
    return tuple(values.tolist())


def check_mean_and_std(channels: int, mean: Channels | None, std: Channels | None) -> None:
    """Check that there is one number for each channel, for pixels in [0, 1].

    Raises:
        InputError: there are more or fewer, or numbers for pixels from 0 to 255.
    """
    wanted, gray = counted(channels, "number"), ""
    if channels > 1 and any(each is not None and len(each) == 1 for each in (mean, std)):
        gray = " For grayscale images, write channels: 1 or --channels 1."
    if mean is not None and not (len(mean) == channels and all(0 <= value <= 1 for value in mean)):
        raise InputError(f"mean is {list(mean)}. Write {wanted} in [0, 1], for pixels in [0, 1].{gray}")
    if std is not None and not (len(std) == channels and all(0 < value < float("inf") for value in std)):
        raise InputError(f"std is {list(std)}. Write {wanted} above 0, for pixels in [0, 1].{gray}")
