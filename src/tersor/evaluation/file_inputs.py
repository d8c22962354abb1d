"""The inputs of a model file: their names, types and shapes, and the arrays that fit them. Needs numpy, never torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tersor.core.errors import InputError
from tersor.core.inputs import Inputs

Array: TypeAlias = NDArray[Any]
FileArrays: TypeAlias = Array | Inputs[Array]
"""Images (N, C, H, W), or several arrays (N, ...), in the order of the file's inputs or by their names."""


@dataclass(frozen=True)
class FileInput:
    """An input of a file.

    Attributes:
        name: name in the file.
        dtype: data type.
        shape: (N, ...); None for any size.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    def check(self, array: Array, name: str = "") -> None:
        """Raises:
        InputError: the type or shape of `array` does not fit; the message contains `name`.
        """
        fits = len(array.shape) == len(self.shape) and all(
            expected in {None, size} for expected, size in zip(self.shape, array.shape, strict=True)
        )
        if array.dtype != self.dtype or not fits:
            shape = ", ".join("any" if size is None else str(size) for size in self.shape)
            raise InputError(
                f"the network takes {self.dtype} of shape ({shape}){name}, but the input is {array.dtype} of shape "
                f"{array.shape}."
            )


def checked(inputs: Sequence[FileInput], arrays: FileArrays) -> None:
    """Check arrays against the inputs of a file.

    Raises:
        InputError: another number or other names of inputs, or a type or shape that does not fit.
    """
    if not isinstance(arrays, Inputs):
        if len(inputs) > 1:
            raise InputError(f"the network takes the inputs {_names(inputs)}, but one array was given.")
        inputs[0].check(arrays)
        return
    found = by_name(inputs, arrays)
    for each in inputs:
        each.check(found[each.name], f" as {each.name}")


def by_name(inputs: Sequence[FileInput], arrays: FileArrays) -> dict[str, Array]:
    """The arrays by the names of the file's inputs.

    Raises:
        InputError: another number or other names of inputs.
    """
    if not isinstance(arrays, Inputs):
        return {inputs[0].name: arrays}
    try:
        return arrays.by_name(tuple(each.name for each in inputs))
    except KeyError:
        given = ", ".join(arrays.kwargs) or f"{len(arrays.args)} arrays"
        raise InputError(f"the network takes the inputs {_names(inputs)}, but {given} were given.") from None


def _names(inputs: Sequence[FileInput]) -> str:
    return ", ".join(each.name for each in inputs)
