"""The input of a network: images (N, C, H, W), or several tensors (N, ...)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self, TypeAlias, cast

import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.core.inputs import Inputs


class TensorInputs(Inputs[Tensor]):
    """Several input tensors (N, ...), with the methods of a tensor that a batch of images needs."""

    def to(self, place: torch.device | Tensor) -> Self:
        """Move the tensors to a device, or to the device and (unless they are integers) the data type of a tensor."""
        if isinstance(place, Tensor):
            return self.map(lambda each: each.to(place) if each.is_floating_point() else each.to(place.device))
        return self.map(lambda each: each.to(place))

    def cpu(self) -> Self:
        """On the CPU."""
        return self.map(lambda each: each.cpu())

    def float(self) -> Self:
        """Floating-point tensors in float32."""
        return self.map(lambda each: each.float() if each.is_floating_point() else each)

    def clone(self) -> Self:
        """A copy."""
        return self.map(lambda each: each.clone())

    def contiguous(self) -> Self:
        """Contiguous in memory."""
        return self.map(lambda each: each.contiguous())

    def requires_grad_(self) -> Self:
        """Floating-point tensors record gradients."""
        return self.map(lambda each: each.requires_grad_() if each.is_floating_point() else each)

    def is_floating_point(self) -> bool:
        """Whether at least one tensor is floating point."""
        return any(each.is_floating_point() for each in self.all())

    @property
    def device(self) -> torch.device:
        """The device of the first tensor."""
        return self.all()[0].device

    @property
    def shape(self) -> torch.Size:
        """The shape of the first tensor."""
        return self.all()[0].shape

    @property
    def ndim(self) -> int:
        """The number of dimensions of the first tensor."""
        return self.all()[0].ndim

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the first tensor."""
        return self.all()[0].dtype


NetworkInput: TypeAlias = Tensor | TensorInputs
"""Images (N, C, H, W), or several tensors."""


def tensors_of(inputs: NetworkInput) -> list[Tensor]:
    """The tensors of an input."""
    return inputs.all() if isinstance(inputs, TensorInputs) else [inputs]


def by_name(names: tuple[str, ...], inputs: TensorInputs) -> list[Tensor]:
    """The tensors in the order of `names`, the names of all inputs of the network.

    Raises:
        InputError: another number of inputs, or other names.
    """
    try:
        found = inputs.by_name(names)
    except KeyError:
        given = ", ".join(inputs.kwargs) or f"{len(inputs.args)} tensors"
        raise InputError(
            f"the network takes the inputs {', '.join(names)}, but a batch has {given}. Pass the same inputs in every "
            "batch."
        ) from None
    return [found[name] for name in names]


def same_sizes(one: NetworkInput, other: NetworkInput) -> bool:
    """Whether two batches differ in nothing but the number of rows, so that they can be joined."""
    return [each.shape[1:] for each in tensors_of(one)] == [each.shape[1:] for each in tensors_of(other)]


def joined_inputs(batches: Iterable[NetworkInput]) -> NetworkInput:
    """Concatenate several batches into one, with the inputs in the order of the first batch.

    Raises:
        InputError: the batches have inputs of different names.
    """
    every = list(batches)
    if isinstance(every[0], Tensor):
        return torch.cat(cast("list[Tensor]", every))
    names = tuple(every[0].kwargs)
    rows = [by_name(names, each) if names and isinstance(each, TensorInputs) else tensors_of(each) for each in every]
    columns = zip(*rows, strict=True)
    whole = [torch.cat(column) for column in columns]
    return TensorInputs.of(every[0].kwargs, whole)


def several_inputs(first: object) -> TensorInputs | None:
    """The inputs in the first entry of a user's batch; None unless it is a tuple, list or mapping of tensors.

    For a list of tensors (C, H, W) it is None too: those are single images, not inputs.

    Raises:
        InputError: they do not have the same number of rows.
    """
    found: object = dict(cast("Mapping[str, Any]", first)) if isinstance(first, Mapping) else first
    values = list(cast("dict[str, Any]", found).values()) if isinstance(found, dict) else found
    if not isinstance(values, list | tuple) or not values:
        return None
    tensors = list(cast("list[object]", values))
    if not all(isinstance(each, Tensor) and each.ndim for each in tensors):
        return None
    if not isinstance(found, dict) and all(cast("Tensor", each).ndim == 3 for each in tensors):
        return None
    inputs = TensorInputs(cast("dict[str, Tensor]", found) if isinstance(found, dict) else tuple(values))
    if len({len(each) for each in inputs.all()}) > 1:
        shapes = ", ".join(str(tuple(each.shape)) for each in inputs.all())
        raise InputError(
            f"the input tensors of a batch have the shapes {shapes}. Possible: tensors whose first dimension is the "
            "batch."
        )
    return inputs
