"""Comparing rewrites: a network's outputs on a few images before and after.

Capturing and equalizing do not change the outputs, except for the summation order in float32. The layers to equalize
are found by the types and shapes of modules, which does not prove that the outputs stay the same. If the outputs
change, the rewrite is undone and reported, or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tersor.core.device import seeded
from tersor.core.errors import InputError
from tersor.data.batch import images_of
from tersor.data.network_inputs import NetworkInput
from tersor.graph.eval_mode import evaluating
from tersor.graph.forward_call import run

FEW = 4
TOLERANCE = 1e-3
"""Largest allowed change of an output, relative to its largest absolute value."""


def few_images(data: Iterable[Any], device: torch.device) -> tuple[NetworkInput, Iterable[Any]]:
    """The first images of `data` (N, C, H, W), and the data to read afterwards: an iterator is read only once.

    Raises:
        InputError: there is no batch.
    """
    batches = iter(data)
    first = next(batches, None)
    if first is None:
        raise InputError("the data contains no images. Pass batches (N, C, H, W).")
    rest = chain([first], batches) if batches is data else data
    return images_of(first)[:FEW].to(device), rest


@torch.no_grad()
def outputs_of(model: nn.Module, images: NetworkInput, seed: int = 0) -> list[Tensor]:
    """All floating-point tensors that `model` returns in eval mode for `images` (N, C, H, W), in any container.

    Random numbers come from `seed`. A forward method that works in place changes a copy of the images.
    """
    with evaluating(model), seeded(seed, images.device):
        leaves: list[Any] = tree_leaves(run(model, images.clone()))
    return [leaf.float() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def difference(after: list[Tensor], before: list[Tensor]) -> float:
    """The largest difference between two lists of outputs, each relative to the largest absolute value `before`.

    Infinite if number or shapes differ, or if NaN or infinity differ.
    """
    if [each.shape for each in after] != [each.shape for each in before]:
        return float("inf")
    return max((_relative(*each) for each in zip(after, before, strict=True)), default=0.0)


def _relative(after: Tensor, before: Tensor) -> float:
    same = (after == before) | (after.isnan() & before.isnan())
    apart = (after - before).abs()[~same]
    if not apart.numel():
        return 0.0
    if not apart.isfinite().all():
        return float("inf")
    return float(apart.max() / before[before.isfinite()].abs().max().clamp(min=torch.finfo(torch.float32).tiny))


def require_same(after: nn.Module, expected: list[Tensor], images: NetworkInput) -> None:
    """Refuse a captured network whose outputs on `images` (N, C, H, W) are not the `expected` ones of the original.

    Raises:
        InputError: the outputs differ by more than rounding.
    """
    found = difference(outputs_of(after, images), expected)
    if not found <= TOLERANCE:
        kind = type(after).__name__
        raise InputError(
            f"the captured graph of {kind} is not equivalent to {kind}: at batch size {len(images)}, the "
            f"outputs differ by {found:.2g} of their largest value; {TOLERANCE:g} is allowed. The forward method must "
            "depend only on its input: no random numbers in eval mode, no counters, no Python attributes that change, "
            "no branch on the batch size."
        )


@torch.no_grad()
def undone_unless_same(model: nn.Module, images: NetworkInput, rewrite: Callable[[], object], what: str) -> str | None:
    """Rewrite the tensors of `model` in place, and undo that if its outputs on `images` (N, C, H, W) change.

    Args:
        model: the network.
        images: some calibration images.
        rewrite: changes parameters and buffers of `model`, but not its structure.
        what: name of the rewrite in the note.

    Returns:
        A note for the user if it was undone, else None.
    """
    tensors = [*model.parameters(), *model.buffers()]
    saved, before = [each.clone() for each in tensors], outputs_of(model, images)
    rewrite()
    found = difference(outputs_of(model, images), before)
    if found <= TOLERANCE:
        return None
    for tensor, value in zip(tensors, saved, strict=True):
        tensor.copy_(value)
    return f"{what} was undone: it changed the outputs by {found:.2g} of their largest value; {TOLERANCE:g} is allowed"
