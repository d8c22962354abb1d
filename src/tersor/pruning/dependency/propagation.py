"""The walk along a captured graph that gives every value its atoms, one rule for each operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx, nn

from tersor.pruning.dependency.shape_recording import Recorded, Shape, attribute
from tersor.pruning.dependency.union_find import Atoms, Ids, Labelled

Place = tuple[str, str]
"""What can be made smaller: (layer, "out" or "in"), (parameter, dimension), (node, its argument)."""


@dataclass
class Call:
    """A node that is walked through.

    Attributes:
        node: the node itself.
        name: of what it calls, `conv2d`; of a module's class.
        args: tensors as `Labelled`, everything else as it was on the recorded run.
        kwargs: the same.
        gives: what it gave on that run, with `Shape` in the place of tensors.
        module: that it calls, if it does.
    """

    node: fx.Node
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gives: Any
    module: nn.Module | None = None

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """By position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    @property
    def tensors(self) -> list[Labelled]:
        """All that it reads, also within lists."""
        return list(flat([*self.args, *self.kwargs.values()]))


Rule = Callable[["ChannelPropagation", Call], Any]


@dataclass
class ChannelPropagation:
    """What is known of the graph so far.

    Attributes:
        graph: the captured network.
        recorded: of one run of it.
        inner: where a dimension splits into several (heads and their width, groups), whether the inner one shrinks.
        atoms: all of them.
        values: node -> its value, tensors as `Labelled`.
        places: what can be made smaller -> the atoms there.
        across: nodes that normalise across channels: without some of them, they give other values for the rest.
        forked: whether `inner` made a difference.
        mixed: whether a dimension holds several images and channels.
    """

    graph: fx.GraphModule
    recorded: Recorded
    inner: bool
    atoms: Atoms = field(default_factory=Atoms)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    places: dict[Place, Ids | None] = field(default_factory=dict)
    across: set[fx.Node] = field(default_factory=set)
    forked: bool = False
    mixed: bool = False

    def new(self, size: int) -> Ids | None:
        """Atoms of a dimension; one that has a single place cannot shrink."""
        return self.atoms.new(size) if size > 1 else None

    def bind(self, name: str, axis: str, atoms: Ids | None) -> Ids | None:
        """Says which atoms lie at a place, and gives those that do."""
        place = (name, axis)
        if place in self.places:
            self.places[place] = self.atoms.match(self.places[place], atoms, f"{name} reads what cannot shrink")
        else:
            self.places[place] = atoms
        return self.places[place]

    def bound(self, name: str, axis: str, size: int) -> Ids | None:
        """The atoms at a place, new ones at the first time."""
        return self.places[name, axis] if (name, axis) in self.places else self.bind(name, axis, self.new(size))

    def united(self, parts: Ids, axis: int) -> Ids:
        """All atoms of a place along `axis` of `parts` go together: one for each place."""
        rows = np.moveaxis(parts, axis, 0).reshape(parts.shape[axis], -1)
        for column in range(1, rows.shape[1]):
            self.atoms.unite(rows[:, 0], rows[:, column])
        return rows[:, 0].copy()

    def either(self, parts: Ids, outer: int, inner: int) -> Ids:
        """As `united`, along one of two dimensions: heads, or places of every head."""
        self.forked |= outer != inner
        return self.united(parts, inner if self.inner else outer)

    def literal(self, call: Call, path: str, old: int, atoms: Ids | None) -> None:
        """An argument of the node counts `atoms`; one that another node computes follows by itself."""
        if atoms is not None and _reaches(call.node, path):
            self.places[call.node.name, f"{path}={old}"] = atoms

    def keep(self, call: Call, why: str = "") -> Any:
        """Nothing of what the node reads can go, nor of what it gives."""
        why = why or f"they go into {call.node.name} ({call.name}), for which there is no rule"
        for tensor in call.tensors:
            for atoms in tensor.atoms:
                self.atoms.keep(atoms, why)
        return fixed(call.gives)

    def tensor(self, path: str) -> Labelled:
        """A parameter or buffer that the graph reads by itself; of a layer, the same as the layer's."""
        found = attribute(self.graph, path)
        if not found.is_floating_point():  # numbers of places
            return Labelled.fixed(found.shape)
        owner, _, name = path.rpartition(".")
        layer = self.graph.get_submodule(owner)
        if isinstance(layer, nn.Linear | nn.Conv2d) and name in {"weight", "bias"} and getattr(layer, "groups", 1) == 1:
            axes = [(owner, axis) for axis in ("out", "in", "2", "3")]
        else:
            axes = [(path, str(axis)) for axis in range(found.ndim)]
        atoms = [self.bound(*axis, size) for axis, size in zip(axes[: found.ndim], found.shape, strict=True)]
        return Labelled(tuple(found.shape), tuple(atoms))


def walked(
    graph: fx.GraphModule, recorded: Recorded, rule_of: Callable[[Call], Rule], *, inner: bool
) -> ChannelPropagation:
    """The whole graph."""
    walk = ChannelPropagation(graph, recorded, inner)
    for node in graph.graph.nodes:
        walk.values[node] = _value(walk, node, rule_of)
    return walk


def _value(walk: ChannelPropagation, node: fx.Node, rule_of: Callable[[Call], Rule]) -> Any:
    gives = walk.recorded[node]
    if node.op == "placeholder":
        return fixed(gives)
    if node.op == "get_attr":
        return walk.tensor(str(node.target)) if isinstance(gives, Shape) else gives
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda read: walk.values[read])
    module = walk.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    call = Call(node, called(node, module), tuple(args), dict(kwargs), gives, module)
    if node.op == "output":
        return walk.keep(call, "they are the answers")
    if not any(True for _ in _shapes(gives)):
        return gives  # a size, a device
    if call.name in {"zeros", "new_zeros"}:
        return _zeros(walk, call)
    if not call.tensors:
        return fixed(gives)
    try:
        return rule_of(call)(walk, call)
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        return walk.keep(call, f"they go into {node.name} ({call.name}) in a way that its rule does not know: {error}")


def _zeros(walk: ChannelPropagation, call: Call) -> Labelled:
    """Of zeros that are made with sizes of their own, any may go: they pad channels."""
    first = 1 if call.name == "new_zeros" else 0
    nested = len(call.node.args) > first and isinstance(call.node.args[first], tuple | list)
    sizes = call.node.args[first] if nested else call.node.args[first:]
    assert isinstance(sizes, tuple | list)
    atoms: list[Ids | None] = []
    for axis, size in enumerate(sizes):
        atoms.append(walk.new(size) if isinstance(size, int) else None)
        walk.literal(call, f"args.{first}.{axis}" if nested else f"args.{first + axis}", call.gives[axis], atoms[-1])
    return Labelled(tuple(call.gives), tuple(atoms)) if len(atoms) == len(call.gives) else fixed(call.gives)


def _reaches(node: fx.Node, path: str) -> bool:
    """Whether `path` leads to an argument, through lists and slices that are written in the graph itself."""
    if not path.startswith(("args.", "pin args.", "kwargs.")):
        return True
    first, *steps = path.removeprefix("pin ").split(".")
    value: Any = getattr(node, first)
    for step in steps:
        if isinstance(value, fx.Node):
            return False
        value = getattr(value, step) if isinstance(value, slice) else value[int(step) if step.isdecimal() else step]
    return True


def called(node: fx.Node, module: nn.Module | None = None) -> str:
    """The name of what a node calls."""
    if module is not None:
        return type(module).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def fixed(value: Any) -> Any:
    """A recorded value, of whose tensors nothing can go."""
    if isinstance(value, Shape):
        return Labelled.fixed(value)
    if isinstance(value, tuple | list) and type(value) in {tuple, list}:
        return type(value)(fixed(each) for each in value)
    if isinstance(value, dict):
        return {key: fixed(each) for key, each in value.items()}
    return value


def flat(value: Any) -> Iterator[Labelled]:
    """All tensors in a value."""
    if isinstance(value, Labelled):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from flat(each)
    elif isinstance(value, dict):
        yield from flat(list(value.values()))


def _shapes(value: Any) -> Iterator[Shape]:
    if isinstance(value, Shape):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _shapes(each)
