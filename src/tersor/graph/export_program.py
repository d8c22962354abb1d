"""Running torch.export on a copy of a user's network, and explaining why it refuses one."""

from __future__ import annotations

import copy
import logging
import re
import traceback
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.fx.graph import CodeGen
from torch.utils._pytree import SUPPORTED_NODES

from tersor.core.errors import InputError
from tersor.data.network_inputs import NetworkInput, TensorInputs, tensors_of
from tersor.graph.aten import operator_name
from tersor.graph.batch_constants import compute_batch_sizes
from tersor.graph.common_operators import use_common_operators
from tersor.graph.forward_call import dynamic_shapes, input_names, input_nodes
from tersor.graph.inlined_regions import inline_regions
from tersor.graph.parametrization import strip
from tersor.graph.plain_attention import with_plain_attention
from tersor.graph.plain_checkpointing import without_checkpointing
from tersor.graph.stack_traces import frames_in, place_in

_UNKNOWN_OUTPUT = re.compile(r"Found <class '(.+?)'> in output, which is not a known type")
_OTHER_BATCH = 5
"""Images of a second recording; the first has two, and the captured graph is compared on one and on three."""
_WAY_OUT = (
    "A forward method must not branch on the values of tensors or create tensors of data-dependent size. Compress "
    "only a submodule without that part, such as model.backbone, and put the result in its place."
)


def exported(model: nn.Module, images: NetworkInput) -> fx.GraphModule:
    """The graph of aten operators that `model` runs in eval mode, with a dynamic batch size.

    Args:
        model: the network; it stays unchanged, because a copy is run.
        images: (N, C, H, W) or several tensors, N >= 2, on the device of the network.

    Raises:
        InputError: torch.export cannot record the network; the message names the line of the network.
    """
    try:
        program = _exported(_copied(model), images, Dim.DYNAMIC)
    except _Refused as first:
        return _with_batch_found(images, model, first)
    return _finished(_plain_graph(program), model, images)


def _plain_graph(program: ExportedProgram) -> fx.GraphModule:
    with without_exporter_output():
        graph = program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    _plain_signature(graph, program)
    inline_regions(graph)
    return graph


def _finished(graph: fx.GraphModule, model: nn.Module, images: NetworkInput) -> fx.GraphModule:
    if isinstance(images, TensorInputs):
        _rename_inputs(graph.graph, input_names(model, images))
    use_common_operators(graph.graph)
    return graph


def _rename_inputs(graph: fx.Graph, names: Sequence[str]) -> None:
    """Give the inputs the names that the network has for them; the exporter writes names in lower case."""
    for node, name in zip(input_nodes(graph), names, strict=True):
        if node.target != name:
            with graph.inserting_before(node):
                renamed = graph.placeholder(name)
            renamed.meta = node.meta
            node.replace_all_uses_with(renamed)
            graph.erase_node(node)


class _Refused(Exception):  # noqa: N818 - never leaves this module
    """torch.export has refused the network."""


def _copied(model: nn.Module) -> nn.Module:
    """A copy in eval mode with computed weights in place of parametrizations; what `forward` stores stays in it."""
    network = with_plain_attention(strip(model).eval())
    for parameter in network.parameters():  # without gradients, torch would take the fast path of attention
        if parameter.is_floating_point():
            parameter.requires_grad_()
    return network


def _exported(network: nn.Module, images: NetworkInput, batch: Any) -> ExportedProgram:
    try:
        with without_exporter_output(), without_checkpointing():
            args, kwargs = ((images,), {}) if isinstance(images, Tensor) else (images.args, images.kwargs)
            shapes = dynamic_shapes(network, images, batch)
            return torch.export.export(network, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever the forward method and torch.export raise
        raise _Refused from error


def _with_batch_found(images: NetworkInput, model: nn.Module, first: _Refused) -> fx.GraphModule:
    """Where the code compares the batch size with a cached one, a fresh copy keeps it dynamic with `Dim.AUTO`.

    Where the code makes it a number, two recordings show which constants depend on it.
    """
    error = first.__cause__
    assert isinstance(error, Exception)
    if "Constraints violated" not in str(error) and "specialize" not in str(error).lower():
        raise _refusal(model, error) from error
    try:
        graph = _plain_graph(_exported(_copied(model), images, Dim.AUTO))
        if not _batch_is_free(graph):
            _free_batch(graph, model, images)
    except _Refused:
        raise InputError(
            f"the graph of {type(model).__name__} cannot be captured: its forward method fixes the batch "
            f"size{_place(error)}. Possible reasons: it loops over the images, branches on their number, or stores a "
            "tensor of that size. Write a forward method that runs the same operators for any number of images."
        ) from error
    return _finished(graph, model, images)


def _free_batch(graph: fx.GraphModule, model: nn.Module, images: NetworkInput) -> None:
    """Compute what depends on the batch size, found by a second recording, in `graph`."""
    more = images[torch.arange(_OTHER_BATCH) % len(images)]
    other = _plain_graph(_exported(_copied(model), more, Dim.AUTO))
    with without_exporter_output():
        if not compute_batch_sizes(graph, other, tensors_of(images), len(more)):
            raise _Refused


def _batch_is_free(graph: fx.GraphModule) -> bool:
    inputs = next(iter(graph.graph.find_nodes(op="placeholder")))
    return not is_concrete_int(inputs.meta["val"].shape[0])


@contextmanager
def without_exporter_output() -> Generator[None]:
    """Context that hides the warnings, logs and graphs of torch.export; `refusal_reason` explains its errors."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):  # it prints the graph up to an error
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _refusal(model: nn.Module, error: Exception) -> InputError:
    return InputError(f"the graph of {type(model).__name__} cannot be captured: {refusal_reason(error)}")


def refusal_reason(error: BaseException) -> str:
    """What the forward method does that torch.export cannot record, with file and line, and the way out."""
    way_out = _WAY_OUT if "data-dependent" in str(error) or "data-dependent" in type(error).__name__ else ""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error)).rstrip(".")
    if "fake tensor in the exported program" in reason:
        reason = "it uses the .data of a tensor"
        way_out = "Read values with detach(), write into buffers with copy_(), and change no parameter in forward."
    if unknown := _UNKNOWN_OUTPUT.search(reason):
        reason = f"it returns a {unknown[1].rpartition('.')[2]}, which may hold tensors that torch cannot find"
        way_out = "Return tensors in a tuple, list, dict, named tuple or dataclass."
    if "Could not guard on data-dependent" in reason or "data-dependent" in type(error).__name__.lower():
        reason = "it branches on the values of a tensor"
    return f"{reason[:300]}{_place(error)}. {way_out}".rstrip()


def _place(error: BaseException) -> str:
    """` (file.py, line 12: if x.sum() > 0:)`: the innermost line of the user's code."""
    frames = [(each.filename, each.lineno or 0, each.line or "") for each in traceback.extract_tb(error.__traceback__)]
    return place_in([*frames, *frames_in(str(error))])


def _plain_signature(graph: fx.GraphModule, program: ExportedProgram) -> None:
    """Replace the exporter's flattened output by the network's own tuples, lists and dicts; remove its checks."""
    output = next(iter(graph.graph.find_nodes(op="output")))
    spec = program.call_spec.out_spec
    assert spec is not None
    output.args = (_unflattened(list(output.args[0]), spec, graph),)  # type: ignore[arg-type]
    graph.graph.set_codegen(CodeGen())
    for node in reversed(list(graph.graph.nodes)):
        check = str(node.target).startswith(("aten._assert", "_guards_fn", "aten.sym_constrain"))
        if (check or _overwrites_input(node)) and not node.users:
            graph.graph.erase_node(node)


def _overwrites_input(node: fx.Node) -> bool:
    """Whether a tensor is copied onto the images, as the exporter writes it for a buffer that `forward` registers."""
    return operator_name(node) == "copy_" and isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder"


def _unflattened(leaves: list[Any], spec: Any, graph: fx.GraphModule) -> Any:
    if spec.is_leaf():
        return leaves.pop(0)
    children = [_unflattened(leaves, each, graph) for each in spec.children()]
    if spec.type in (tuple, list):
        return spec.type(children)
    if spec.type is dict:
        return dict(zip(spec.context, children, strict=True))
    return _constructed(spec, children, graph)


def _constructed(spec: Any, children: list[Any], graph: fx.GraphModule) -> Any:
    """Other containers (named tuples, Hugging Face's ModelOutput) are built by a module at the end of the graph."""
    output = next(iter(graph.graph.find_nodes(op="output")))
    name = "container"
    while hasattr(graph, name):
        name += "_"
    graph.add_module(name, Container(spec))
    with graph.graph.inserting_before(output):
        return graph.graph.call_module(name, tuple(children))


class Container(nn.Module):
    """Builds a container (tuple, list or dict) that a network returns. Its inputs are the entries of the container."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.spec = copy.deepcopy(spec)

    def forward(self, *values: Any) -> Any:
        """The container with these values."""
        return SUPPORTED_NODES[self.spec.type].unflatten_fn(list(values), self.spec.context)
