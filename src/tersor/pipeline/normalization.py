"""Mean and standard deviation that a user gives for a network, checked against its images.

Normalized pixels lie between `(0 - mean) / std` and `(1 - mean) / std`, a range of width `1 / std`. So two mistakes
are visible in the values of the images alone:

* Pixels from 0 to 255, or another unit: values are further outside the range than five times its width. Random numbers
  and the overshoot of resizing stay within this distance.
* Pixels in [0, 1] that were not normalized: at least 16 images have no value below 0 and none above 1, although the
  range reaches far below 0. Normalized images would have such values only if all their pixels were between the mean and
  one deviation above it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from tersor.core.errors import CompressionWarning, InputError
from tersor.data.batch import images_of
from tersor.data.network_inputs import NetworkInput
from tersor.evaluation.verification import Normalization

NORMALIZATION = "normalization"
"""Key of the `meta` of a quantized graph: mean and standard deviation of its images, or None."""

_FAR = 5.0
"""Distance from the range of normalized pixels, as a multiple of its width."""
_IMAGES = 16
_FAR_BELOW = -0.5


def check_normalization(name: str, given: object, channels: int) -> Normalization:
    """Check that `given` are mean and standard deviation of pixels in [0, 1], and return them as plain numbers.

    Args:
        name: name of the argument.
        given: two lists, arrays or tensors (channels,).
        channels: number of channels.

    Raises:
        InputError: they are not such numbers, or their number differs from `channels`.
    """
    try:
        mean, deviation = (torch.as_tensor(each, dtype=torch.float64).cpu() for each in cast("Sequence[Any]", given))
    except (TypeError, ValueError, RuntimeError):
        mean = deviation = torch.tensor(float("nan"))
    if not mean.shape == deviation.shape == (channels,) or not (deviation > 0).all() or not mean.isfinite().all():
        raise InputError(
            f"{name} is {given!r}. Pass mean and standard deviation: two lists of {channels} numbers, the second "
            "above 0."
        )
    if (mean.abs() > 2).any() or (deviation > 2).any():
        raise InputError(f"{name} is {given!r}. Pass mean and standard deviation of pixels in [0, 1], not in 0 to 255.")
    return tuple(mean.tolist()), tuple(deviation.tolist())


def known_normalization(
    model: object, normalization: object, pixels: Normalization | None, images: NetworkInput
) -> Normalization | None:
    """The normalization of an exported network: that of the arguments of `export`, or that of `quantize`.

    Raises:
        InputError: they contradict each other, or `normalization` does not fit the images.

    Warns:
        CompressionWarning: it contradicts the values of the images.
    """
    before: Normalization | None = model.meta.get(NORMALIZATION) if isinstance(model, fx.GraphModule) else None
    if normalization is None and pixels is None and before is None:
        return None
    if not isinstance(images, Tensor):
        raise InputError("normalization is for images, but this network has several inputs. Leave it out.")
    given = {NORMALIZATION: normalization, "pixels": pixels}
    known = {name: check_normalization(name, each, images.shape[1]) for name, each in given.items() if each is not None}
    (name, told), *others = [*known.items(), *([("quantize", before)] if before else [])]
    for other, values in others:
        if not torch.allclose(torch.tensor(told), torch.tensor(values), atol=1e-3):
            source = "quantize was called with" if other == "quantize" else f"{other} is"
            raise InputError(f"{name} is {told}, but {source} {values}. Leave out {name}, or give the same values.")
    _warn_of_values("the example", [images.float().cpu()], told, look_for_unit=False)
    return told


def check_values(
    batches: Iterable[Any], normalization: object, who: str = "the calibration images", stacklevel: int = 4
) -> Normalization:
    """Compare the first images with the normalization that they should have, and return it.

    Args:
        batches: the images.
        normalization: mean and standard deviation.
        who: how the warning names the images.
        stacklevel: stack level of the warning, so that it names the user's line.

    Raises:
        InputError: the normalization does not fit the images.

    Warns:
        CompressionWarning: their values contradict it.
    """
    few: list[Tensor] = []
    for batch in batches:
        images = images_of(batch)
        if not isinstance(images, Tensor):
            raise InputError("normalization is for images, but this network has several inputs. Leave it out.")
        few.append(images.detach().float().cpu())
        if sum(map(len, few)) >= _IMAGES:
            break
    told = check_normalization(NORMALIZATION, normalization, few[0].shape[1])
    enough = sum(map(len, few)) >= _IMAGES
    _warn_of_values(who, few, told, look_for_unit=enough, stacklevel=stacklevel)
    return told


def _warn_of_values(
    who: str, batches: Sequence[Tensor], given: Normalization, *, look_for_unit: bool, stacklevel: int = 4
) -> None:
    """Warn of values that normalized images cannot have; `look_for_unit`: also of values in [0, 1]."""
    mean, deviation = (torch.tensor(each) for each in given)
    low, high = -mean / deviation, (1 - mean) / deviation
    by_channel = [batch.transpose(0, 1).flatten(1) for batch in batches if len(batch)]
    least = torch.stack([each.amin(1) for each in by_channel]).amin(0)
    most = torch.stack([each.amax(1) for each in by_channel]).amax(0)
    far = (least < low - _FAR * (high - low)) | (most > high + _FAR * (high - low))
    in_unit = look_for_unit and (low < _FAR_BELOW).all() and least.min() >= 0 and most.max() <= 1
    if far.any() or in_unit:
        warnings.warn(
            f"{who} {'have' if who.endswith('s') else 'has'} values from {least.min():.3g} to {most.max():.3g}, but "
            f"pixels normalized with mean {_shown(mean)} and std {_shown(deviation)} lie between {low.min():.3g} and "
            f"{high.max():.3g}. Pass images normalized as in training: (pixel / 255 - mean) / std.",
            CompressionWarning,
            stacklevel=stacklevel,
        )


def _shown(values: Tensor) -> str:
    return " ".join(f"{value:.3g}" for value in values.tolist())
