"""Running networks, and captured graphs, on images or on several input tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from tersor.data.network_inputs import NetworkInput, TensorInputs, by_name, tensors_of

IMAGES = "images"
"""Name of the only input of a file."""


@dataclass(frozen=True)
class InputSpec:
    """An input of a network.

    Attributes:
        name: name of the keyword argument, or None for a positional one.
        shape: the shape without the batch.
        dtype: the data type, such as "float32".
    """

    name: str | None
    shape: tuple[int, ...]
    dtype: str


def specs_of(inputs: NetworkInput) -> tuple[InputSpec, ...]:
    """The `InputSpec` of each tensor of an input."""
    names = [*inputs.kwargs] if isinstance(inputs, TensorInputs) and inputs.kwargs else None
    tensors = tensors_of(inputs)
    return tuple(
        InputSpec(name, tuple(each.shape[1:]), str(each.dtype).removeprefix("torch."))
        for name, each in zip(names or [None] * len(tensors), tensors, strict=True)
    )


def zeros(specs: Sequence[InputSpec], count: int, device: torch.device | None = None) -> NetworkInput:
    """An input of `count` rows with the value zero."""
    tensors = [torch.zeros(count, *each.shape, dtype=getattr(torch, each.dtype), device=device) for each in specs]
    if len(specs) == 1 and specs[0].name is None:
        return tensors[0]
    return TensorInputs.of([each.name for each in specs if each.name is not None], tensors)


class _ViewOrCopy(TorchFunctionMode):
    """`view` fails for some tensors in channels_last, the layout of images and of training: then a copy is viewed."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if func not in (Tensor.view, Tensor.view_as) or "view size is not compatible" not in str(error):
                raise
            return func(args[0].contiguous(), *args[1:], **(kwargs or {}))


def run(network: Any, inputs: NetworkInput, *others: Any) -> Any:
    """The outputs of a network for images, or several tensors; `others` are further positional arguments."""
    with nullcontext() if isinstance(network, fx.GraphModule) else _ViewOrCopy():
        if isinstance(inputs, TensorInputs):
            outputs = network(*inputs.args, *others, **inputs.kwargs)
        else:
            outputs = network(inputs, *others)
    _register_dataclasses(outputs)
    return outputs


def _register_dataclasses(outputs: Any) -> None:
    """Make dataclasses in the outputs known to torch, as tuples and dicts are: their tensors are outputs, too."""
    if isinstance(outputs, Tensor):
        return
    for leaf in tree_leaves(outputs):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            _register_dataclasses(outputs)
            return


def input_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The inputs of a captured network."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def in_order(graph: fx.Graph, inputs: NetworkInput) -> list[Tensor]:
    """The tensors in the order of the inputs of a captured network."""
    if isinstance(inputs, Tensor):
        return [inputs]
    return by_name(tuple(str(node.target) for node in input_nodes(graph)), inputs)


def input_names(network: nn.Module, inputs: NetworkInput) -> tuple[str, ...]:
    """The names of the inputs in a file: `images`, or for several tensors the arguments of the network's forward."""
    if isinstance(inputs, Tensor):
        return (IMAGES,)
    if inputs.kwargs:
        return tuple(inputs.kwargs)
    if isinstance(network, fx.GraphModule):
        return tuple(str(node.target) for node in input_nodes(network.graph))
    parameters = inspect.signature(network.forward).parameters.values()
    names = [each.name for each in parameters if each.kind is not each.VAR_POSITIONAL]
    more = [f"input_{number}" for number in range(len(names), len(inputs.args))]
    return tuple([*names, *more][: len(inputs.args)])


def dynamic_shapes(network: nn.Module, inputs: NetworkInput, batch: Any) -> dict[str, Any]:
    """The argument of torch.export: `batch` as the size of dimension 0 of every input, by the arguments of forward."""
    args, kwargs = ((inputs,), {}) if isinstance(inputs, Tensor) else (inputs.args, inputs.kwargs)
    given = inspect.signature(network.forward).bind(*args, **kwargs).arguments
    return tree_map(lambda _: {0: batch}, dict(given))
