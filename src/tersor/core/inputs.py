"""Several input arrays of a network, which share their first dimension, the batch. Needs neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar


class Rows(Protocol):
    """A tensor or numpy array."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...


T = TypeVar("T", bound=Rows)


@dataclass(frozen=True)
class Inputs(Generic[T]):
    """Several inputs (N, ...) of a network.

    Attributes:
        values: a tuple of positional arguments, or a mapping of keyword arguments.
    """

    values: tuple[T, ...] | Mapping[str, T]

    @classmethod
    def of(cls, names: Iterable[str], values: Iterable[T]) -> Self:
        """Keyword arguments with these names; positional ones if there are no names."""
        keywords = list(names)
        return cls(dict(zip(keywords, values, strict=True)) if keywords else tuple(values))

    @property
    def args(self) -> tuple[T, ...]:
        """The positional arguments."""
        return self.values if isinstance(self.values, tuple) else ()

    @property
    def kwargs(self) -> dict[str, T]:
        """The keyword arguments."""
        return {} if isinstance(self.values, tuple) else dict(self.values)

    def all(self) -> list[T]:
        """The inputs, without names."""
        return [*self.args, *self.kwargs.values()]

    def map(self, function: Callable[[T], T]) -> Self:
        """Apply `function` to every input."""
        if isinstance(self.values, tuple):
            return type(self)(tuple(map(function, self.values)))
        return type(self)({name: function(value) for name, value in self.values.items()})

    def by_name(self, names: tuple[str, ...]) -> dict[str, T]:
        """The inputs by name, where `names` are those of all inputs of the network in order.

        Raises:
            KeyError: another number of inputs, or other names.
        """
        found = dict(zip(names, self.args, strict=False)) if self.args else self.kwargs
        if len(found) != len(self.all()) or set(found) != set(names):
            raise KeyError(names)
        return found

    def __len__(self) -> int:
        return len(self.all()[0])

    def __getitem__(self, index: Any) -> Self:
        """The rows at `index` of every input."""
        return self.map(lambda value: value[index])
