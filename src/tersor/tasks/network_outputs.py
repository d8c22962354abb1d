"""Outputs of any network, a pytree of tensors: their logits, and the distance between two of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from tersor.core.errors import InputError


def in_float32(outputs: Any) -> Any:
    """The outputs with every floating-point tensor in float32."""
    convert = lambda leaf: leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf  # noqa: E731
    return tree_map(convert, outputs)


def logits_in(outputs: Any, rank: int | None = None, names: tuple[str, ...] = ("logits",)) -> Tensor | None:
    """The tensor of logits: the only tensor, the first of `names` in a dict, or the only one of `rank` dimensions.

    Returns:
        None where that is not clear.
    """
    if isinstance(outputs, Tensor):
        return outputs
    entries = named_entries(outputs) or {}
    for name in names:
        if isinstance(entries.get(name), Tensor):
            return entries[name]
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    fitting = leaves if len(leaves) == 1 else [leaf for leaf in leaves if leaf.ndim == rank]
    return fitting[0] if len(fitting) == 1 else None


def named_entries(outputs: Any) -> Mapping[Any, Any] | None:
    """The entries of a dict or a dataclass; None for anything else."""
    if isinstance(outputs, Mapping):
        return cast("Mapping[Any, Any]", outputs)
    if is_dataclass(outputs) and not isinstance(outputs, type):
        return {each.name: getattr(outputs, each.name) for each in fields(outputs)}
    return None


def described(outputs: Any) -> str:
    """The outputs in words: a shape, or the entries of a container."""
    if isinstance(outputs, Tensor):
        return f"shape {tuple(outputs.shape)}"
    entries = named_entries(outputs)
    if entries is not None:
        shown = ", ".join(f"{key} ({described(each)})" for key, each in entries.items())
        return f"a {type(outputs).__name__} with {shown}"
    if isinstance(outputs, list | tuple):
        return f"a {type(outputs).__name__} of {', '.join(described(each) for each in outputs)}"
    return f"a {type(outputs).__name__}"


def given_instead(outputs: Any, found: Tensor | None) -> str:
    """Outputs that do not fit, in words: their type, or the shape of the tensor that was found in them."""
    return f"an object of type {type(outputs).__name__}" if found is None else f"a tensor of shape {tuple(found.shape)}"


def floats_of_both(outputs: Any, reference: Any) -> list[tuple[Tensor, Tensor]]:
    """The floating-point tensors of two outputs, in pairs, on the device of the first.

    Raises:
        InputError: the two differ in number or shapes, or have none.
    """
    both = [
        [leaf for leaf in tree_leaves(each) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        for each in (outputs, reference)
    ]
    shapes = [[tuple(leaf.shape) for leaf in leaves] for leaves in both]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"two outputs cannot be compared: one has the shapes {shapes[0]}, the other {shapes[1]}. Compare "
            "networks that return tensors of the same shapes."
        )
    if not both[0]:
        raise InputError(
            "two outputs cannot be compared: they hold no floating-point tensor. Compare networks that return one."
        )
    return [(one, other.to(one.device)) for one, other in zip(*both, strict=True)]


def relative_squared_error(outputs: Any, reference: Any) -> Tensor:
    """The distance between two outputs as a loss: the mean over tensors of |outputs - reference|^2 / |reference|^2.

    It is differentiable at equal outputs too, unlike its root, the relative L2 error.

    Raises:
        InputError: the two differ in number or shapes of tensors.
    """
    errors = [_ratio(*squares(*both)) for both in floats_of_both(outputs, reference)]
    return torch.stack(errors).mean()


def relative_errors(outputs: Any, reference: Any) -> Tensor:
    """The relative L2 error of each image (N,), float64: the root of the mean over tensors of the squared ratios.

    Raises:
        InputError: the two differ in number or shapes of tensors.
    """
    pairs = [[each.double().reshape(len(each), -1) for each in both] for both in floats_of_both(outputs, reference)]
    errors = [_ratio((one - other).square().sum(1), other.square().sum(1)) for one, other in pairs]
    return torch.stack(errors).mean(0).sqrt()


def relative_squared_error_of_all(pairs: Iterable[tuple[Any, Any]]) -> float:
    """The relative squared error over all batches of (outputs, reference): the two sums of squares are divided.

    Raises:
        InputError: there is no batch, or two outputs differ in number or shapes of tensors.
    """
    sums: list[tuple[float, float]] = []
    for outputs, reference in pairs:
        both = floats_of_both(outputs, reference)
        found = [tuple(map(float, squares(one, other, double=True))) for one, other in both]
        sums = [(a + c, b + d) for (a, b), (c, d) in zip(sums or [(0.0, 0.0)] * len(found), found, strict=True)]
    if not sums:
        raise InputError("outputs cannot be compared without images. Give at least one batch.")
    return sum(change / max(size, torch.finfo(torch.float32).tiny) for change, size in sums) / len(sums)


def relative_values(outputs: Any) -> Tensor:
    """The floating-point values (N, values), scaled: their squared distance is N times the relative squared error.

    The reference is `outputs` itself, as a constant: gradients do not flow through it.
    """
    values = [each.flatten(1) for each, _ in floats_of_both(outputs, outputs)]
    scales = [_ratio(each.new_tensor(len(each) / len(values)), each.detach().square().sum()).sqrt() for each in values]
    return torch.cat([each * scale for each, scale in zip(values, scales, strict=True)], 1)


def squares(one: Tensor, other: Tensor, *, double: bool = False) -> tuple[Tensor, Tensor]:
    """|one - other|^2 and |other|^2, scalars; summed in double precision if `double`."""
    change, size = one - other, other
    if double:
        change, size = change.double(), size.double()
    return change.square().sum(), size.square().sum()


def _ratio(change: Tensor, size: Tensor) -> Tensor:
    return change / size.clamp(min=torch.finfo(torch.float32).tiny)
