"""Channel propagation: every value of a captured graph gets channel ids, one rule for each operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx, nn

from tersor.graph.aten import called_name
from tersor.graph.export_program import Container
from tersor.graph.layer_selection import Layer
from tersor.pruning.dependency.shape_recording import Recorded, Shape, attribute
from tersor.pruning.dependency.union_find import ChannelSets, Ids, TrackedShape

PrunableAxis = tuple[str, str]
"""What removal shortens: (layer, "out" or "in"), (parameter, dimension), or (node, its argument)."""


@dataclass
class Call:
    """A node of the graph: the input of a rule.

    Attributes:
        node: the node itself.
        name: name of the operator or module class that it calls: `matmul`, `Conv2d`.
        args: tensors as `TrackedShape`, everything else as recorded.
        kwargs: the same.
        output: the recorded output, with a `Shape` instead of each tensor.
        module: the module that it calls, if any.
    """

    node: fx.Node
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    module: nn.Module | None = None

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    @property
    def tensors(self) -> list[TrackedShape]:
        """All tensor inputs, also within lists."""
        return list(tensors_in([*self.args, *self.kwargs.values()]))


Rule = Callable[["ChannelPropagation", Call], Any]


@dataclass
class ChannelPropagation:
    """The channel ids of a graph, as far as it was traversed.

    Attributes:
        graph: the captured network.
        recorded: the values of one run.
        inner: where a dimension splits in two (heads and head width, groups and channels), whether the inner one
            shrinks.
        sets: the sets of coupled channels.
        values: node -> its value, tensors as `TrackedShape`.
        axes: prunable axis -> the channel ids along it.
        parts: the channel ids of each part of a split or slice; a part cannot be empty.
        cross_channel: nodes that normalize across channels: removing some changes the output of the others.
        ambiguous_split: whether `inner` made a difference.
        mixes_batch: whether a dimension merges the batch with channels.
    """

    graph: fx.GraphModule
    recorded: Recorded
    inner: bool
    sets: ChannelSets = field(default_factory=ChannelSets)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    axes: dict[PrunableAxis, Ids | None] = field(default_factory=dict)
    parts: list[Ids] = field(default_factory=list)
    cross_channel: set[fx.Node] = field(default_factory=set)
    ambiguous_split: bool = False
    mixes_batch: bool = False

    def bind(self, name: str, axis: str, ids: Ids | None) -> Ids | None:
        """Couple `ids` with the axis of a layer or parameter; return the ids of the axis."""
        key = (name, axis)
        if key in self.axes:
            self.axes[key] = self.sets.couple(self.axes[key], ids, f"{name} reads a tensor of fixed size")
        else:
            self.axes[key] = ids
        return self.axes[key]

    def ids_of(self, name: str, axis: str, size: int) -> Ids | None:
        """The ids of an axis, new ones at its first use; an axis of size 1 keeps its size."""
        if (name, axis) not in self.axes:
            self.bind(name, axis, self.sets.new(size) if size > 1 else None)
        return self.axes[name, axis]

    def merge(self, parts: Ids, axis: int) -> Ids:
        """Couple all ids that share an index along `axis` of `parts`; return one id for each index."""
        rows = np.moveaxis(parts, axis, 0).reshape(parts.shape[axis], -1)
        for column in range(1, rows.shape[1]):
            self.sets.union(rows[:, 0], rows[:, column])
        return rows[:, 0].copy()

    def merge_split(self, parts: Ids, outer: int, inner: int) -> Ids:
        """`merge` along one of two dimensions: heads, or positions within every head."""
        self.ambiguous_split |= outer != inner
        return self.merge(parts, inner if self.inner else outer)

    def track_argument(self, call: Call, path: str, old: int, ids: Ids | None) -> None:
        """Record that a constant argument counts `ids`; an argument that another node computes needs no change."""
        if ids is not None and _is_constant(call.node, path):
            self.axes[call.node.name, f"{path}={old}"] = ids

    def freeze(self, call: Call, reason: str = "") -> Any:
        """Freeze every input of a call; its output has no ids."""
        if not reason:
            reason = f"they go into {call.node.name} ({call.name}), an operator that channel removal does not support"
        for tensor in call.tensors:
            for ids in tensor.ids:
                self.sets.freeze(ids, reason)
        return frozen(call.output)

    def track_attribute(self, path: str) -> TrackedShape:
        """A parameter or buffer that the graph reads directly; that of a layer shares the layer's axes."""
        value = attribute(self.graph, path)
        if not value.is_floating_point():  # indices
            return TrackedShape.frozen(value.shape)
        owner, _, name = path.rpartition(".")
        layer = self.graph.get_submodule(owner)
        if isinstance(layer, Layer) and name in {"weight", "bias"} and getattr(layer, "groups", 1) == 1:
            axes = [(owner, axis) for axis in ("out", "in", "2", "3", "4")]
        else:
            axes = [(path, str(axis)) for axis in range(value.ndim)]
        ids = [self.ids_of(*axis, size) for axis, size in zip(axes[: value.ndim], value.shape, strict=True)]
        return TrackedShape(tuple(value.shape), tuple(ids))


def propagate(
    graph: fx.GraphModule, recorded: Recorded, rule_of: Callable[[Call], Rule], *, inner: bool
) -> ChannelPropagation:
    """Apply the rules to all nodes, in the order of the graph."""
    propagation = ChannelPropagation(graph, recorded, inner)
    for node in graph.graph.nodes:
        propagation.values[node] = _value(propagation, node, rule_of)
    return propagation


def _value(propagation: ChannelPropagation, node: fx.Node, rule_of: Callable[[Call], Rule]) -> Any:
    output = propagation.recorded[node]
    if node.op == "placeholder":
        return frozen(output)
    if node.op == "get_attr":
        return propagation.track_attribute(str(node.target)) if isinstance(output, Shape) else output
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda read: propagation.values[read])
    module = propagation.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    call = Call(node, called_name(node, module), tuple(args), dict(kwargs), output, module)
    if node.op == "output" or isinstance(module, Container):
        return propagation.freeze(call, "they are outputs of the network")
    if not _has_shapes(output):
        return output  # a size, a device
    if call.name in {"zeros", "new_zeros"}:
        return _zeros(propagation, call)
    if not call.tensors:
        return frozen(output)
    try:
        return _of_recorded_shape(rule_of(call)(propagation, call), output)
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        detail = f": {error}" if str(error) else ""
        reason = f"they go into {node.name} ({call.name}) in a way that channel removal does not support{detail}"
        return propagation.freeze(call, reason)


def _of_recorded_shape(value: Any, output: Any) -> Any:
    """What a rule returns, if the rule holds: a layer may run on another dimension, as pooling in 3d does on channels.

    Raises:
        ValueError: its shape differs from that of the operator.
    """
    for tensor, recorded in zip(tensors_in(value), tensors_in(frozen(output)), strict=True):
        sizes = [size if ids is None else len(ids) for size, ids in zip(tensor.shape, tensor.ids, strict=True)]
        if tuple(sizes) != tuple(recorded.shape):
            raise ValueError(f"it returns the shape {tuple(recorded.shape)}")
    return value


def _zeros(propagation: ChannelPropagation, call: Call) -> TrackedShape:
    """Zeros of constant sizes pad channels: any of them can be removed."""
    first = 1 if call.name == "new_zeros" else 0
    sizes = call.node.args[first]
    assert isinstance(sizes, tuple | list)
    ids: list[Ids | None] = []
    for axis, size in enumerate(sizes):
        ids.append(propagation.sets.new(size) if isinstance(size, int) and size > 1 else None)
        propagation.track_argument(call, f"args.{first}.{axis}", call.output[axis], ids[-1])
    return TrackedShape(tuple(call.output), tuple(ids))


def _is_constant(node: fx.Node, path: str) -> bool:
    """Whether `path` leads to an argument through lists and slices, and not through another node."""
    if not path.startswith(("args.", "kwargs.")):
        return True
    first, *steps = path.split(".")
    value: Any = getattr(node, first)
    for step in steps:
        if isinstance(value, fx.Node):
            return False
        value = value[int(step) if step.isdecimal() else step]
    return True


def frozen(value: Any) -> Any:
    """A recorded value in which every tensor is frozen: none of its channels can be removed."""
    if isinstance(value, Shape):
        return TrackedShape.frozen(value)
    if isinstance(value, tuple | list) and type(value) in {tuple, list}:
        return type(value)(frozen(each) for each in value)
    if isinstance(value, dict):
        return {key: frozen(each) for key, each in value.items()}
    return value


def tensors_in(value: Any) -> Iterator[TrackedShape]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, TrackedShape):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def _has_shapes(value: Any) -> bool:
    if isinstance(value, tuple | list) and not isinstance(value, Shape):
        return any(map(_has_shapes, value))
    return isinstance(value, Shape)
