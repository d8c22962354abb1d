"""Which activations to quantize, so that a runtime computes layers in integers.

A runtime uses an integer operator only if its fusion finds quantized values in the expected places:

* ONNX Runtime fuses a convolution only if its *output* is quantized too, so the end of every integer operator
  (convolution + BatchNorm + activation; addition + activation; pooling) gets a quantizer.
* OpenVINO fuses a residual addition into the convolution before it, and keeps the sum in float until it is rounded
  once; a quantizer between the two prevents the fusion.
* ONNX Runtime multiplies two quantized activations (attention) in integers, and returns float. A quantizer after the
  scores costs more time than it saves, so there is none. OpenVINO computes attention in one float kernel, which
  quantizers would split; there it stays in float.

Operators that only move values (reshape, slicing, zero padding, max pooling) keep the grid of their input: rounding to
the same grid twice changes nothing, and the runtime finds an integer operator.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable
from typing import cast

from torch import fx, nn

from tersor.core.errors import InputError
from tersor.core.target import Runtime
from tersor.graph.aten import arguments, last_write, operator_name
from tersor.graph.batchnorm_behind import norm_behind
from tersor.graph.capture import layer_of, sole_user, values_into
from tersor.graph.layer_selection import Layer
from tersor.graph.plain_modules import is_plain
from tersor.quantization.activation_products import matrix_products
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid
from tersor.quantization.output_rounding import rounds_its_output

RUNTIME = "runtime"
"""Key of the `meta` of a quantized graph: the runtime that its quantizers are placed for."""

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
_ACTIVATION_OPERATORS = {"relu", "relu_", "relu6", "relu6_", "hardtanh", "hardtanh_"}
_ADDITIONS = {"add", "add_"}
_JOINS = {*_ADDITIONS, "mul", "mul_"}
CONCATENATIONS = {"cat", "concat", "concatenate"}
_AVERAGES = {"adaptive_avg_pool2d", "avg_pool2d", "mean"}
_AVERAGE_MODULES = (nn.AdaptiveAvgPool2d, nn.AvgPool2d)
_MOVERS = {
    *("flatten", "unflatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "t"),
    *("slice", "select", "max_pool2d", "swapaxes", "swapdims", "movedim", "moveaxis", "reshape_as", "view_as"),
}
_MOVER_MODULES = (nn.Flatten, nn.Unflatten, nn.MaxPool2d, nn.ZeroPad2d)
_SPLITTERS = {"chunk", "split", "split_with_sizes", "unbind"}
_NOTHING_IN_EVAL = {"alias", "detach"}
_NOTHING_IN_EVAL_MODULES = (nn.Dropout, nn.Dropout2d, nn.Identity)
_ANY_MODULE = nn.Module()


def insert_activation_quantizers(
    graph: fx.GraphModule, layers: Iterable[str], grid: Grid, runtime: Runtime
) -> list[str]:
    """Insert disabled activation quantizers, so that `runtime` computes `layers` in integers.

    Args:
        graph: a captured network; it is changed.
        layers: names of the layers, and of the products of `matrix_products`, to compute in integers.
        grid: the grid of the activations.
        runtime: the runtime that will execute the graph.

    Returns:
        The names of the inserted modules, in the order of the graph.

    Raises:
        InputError: the network has a part named `quantizers` already.
    """
    if hasattr(graph, "quantizers"):
        raise InputError("a submodule of the network is named 'quantizers', which is reserved. Rename it.")
    values = _values_to_quantize(graph, set(layers), runtime)
    names: list[str] = []
    graph.add_submodule("quantizers", nn.Module())
    for value, source in values.items():
        name = _name(source)
        if value is source:
            graph.add_submodule(name, FakeQuantize(grid))
            names.append(name)
        read_through(graph, value, name, moved=value is not source)
    graph.recompile()
    graph.meta[RUNTIME] = runtime
    return names


def activation_quantizers(graph: fx.GraphModule, layers: Iterable[str], runtime: Runtime) -> set[str]:
    """The names of the quantizers that `insert_activation_quantizers` would insert; `graph` stays unchanged."""
    return {_name(source) for source in _values_to_quantize(graph, set(layers), runtime).values()}


def without_quantizers(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph over the same modules, without the quantizers of activations."""
    bare = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node in list(bare.graph.nodes):
        if isinstance(layer_of(node), FakeQuantize):
            node.replace_all_uses_with(node.args[0])
            bare.graph.erase_node(node)
    return bare


def _name(source: fx.Node) -> str:
    """A quantizer is named like its node, unless every module has such an attribute (`to`, `type`)."""
    name, others = source.name, {node.name for node in source.graph.nodes}
    while hasattr(_ANY_MODULE, name):
        name += "_"
        while name in others:
            name += "_"
    return f"quantizers.{name}"


def read_through(graph: fx.GraphModule, value: fx.Node, name: str, *, moved: bool) -> None:
    """Inserts a call of the quantizer `name` between `value` and its readers.

    The output of the network is also read through it if the output is the only reader, or if a layer reads `value`: a
    layer whose output is also read in float would be computed in float. If the network writes into `value` in place,
    the call comes after that. `moved` marks values that the quantizer has seen before in another place or shape, so
    that its observer skips them.
    """
    written = last_write(value)
    rounded = value.op != "placeholder" and (_enters_layer(value) or all(each.op == "output" for each in value.users))
    readers = [user for user in value.users if user.op != "output" or rounded]
    if written is not None:
        readers = [user for user in readers if user > written]
    with graph.graph.inserting_after(written or value):
        quantized = graph.graph.call_module(name, (value,), {"moved": True} if moved else {})
    quantized.meta = dict(value.meta)  # the shape
    for reader in readers:
        reader.replace_input_with(value, quantized)


def _enters_layer(value: fx.Node) -> bool:
    """Whether a layer reads `value`, directly or through nodes that only move it."""
    users = value.users
    return any(isinstance(layer_of(each), Layer) or (_only_moves(each) and _enters_layer(each)) for each in users)


def _values_to_quantize(graph: fx.GraphModule, layers: set[str], runtime: Runtime) -> dict[fx.Node, fx.Node]:
    """Value -> the value whose grid it shares (itself, or the one that it was moved from), in graph order."""
    quantized: dict[fx.Node, fx.Node] = {}
    integer: list[fx.Node] = []
    products = {node for name, node in matrix_products(graph).items() if name in layers}
    for node in graph.graph.nodes:
        if node in products or _is_layer(node, layers) or _is_integer_join(node, quantized, runtime):
            integer.append(node)
            for value in values_into(node):
                quantized.setdefault(source_of(value), source_of(value))
            end = fused_end(node)
            if node not in products and (not _is_output(end) or rounds_its_output(node, runtime)):
                quantized[end] = end
    if runtime == "openvino":
        for node in integer:
            if _is_addition(node):
                _keep_addend_in_float(node, quantized)
    for node in graph.graph.nodes:
        if _is_mover(node) and source_of(node) in quantized and _read_in_integers(node, integer):
            quantized[node] = source_of(node)
    return {node: quantized[node] for node in graph.graph.nodes if node in quantized}


def _is_integer_join(node: fx.Node, quantized: Container[fx.Node], runtime: Runtime) -> bool:
    """Whether `node` joins values that are all quantized, and `runtime` has an integer operator for it."""
    known = _joins(node) or (runtime == "onnxruntime" and _is_factor_of_silu(node))
    return known and all(source_of(value) in quantized for value in values_into(node))


def _is_output(node: fx.Node) -> bool:
    """Whether `node` is only an output of the network, which stays in float: rounded logits would have ties."""
    return all(user.op == "output" or (_only_moves(user) and _is_output(user)) for user in node.users)


def _keep_addend_in_float(addition: fx.Node, quantized: dict[fx.Node, fx.Node]) -> None:
    """Leaves one convolution's output in float if only `addition` reads it: the runtime adds within the convolution."""
    for value in values_into(addition):
        if sole_user(value) is addition and isinstance(layer_of(_before_norm(value)), Layer):
            quantized.pop(value, None)
            return


def _before_norm(node: fx.Node) -> fx.Node:
    before = values_into(node)[0] if values_into(node) else node
    norm = norm_behind(before)
    return before if norm is not None and norm.node is node else node


def fused_end(node: fx.Node) -> fx.Node:
    """The last node that a runtime fuses into the operator `node`: its BatchNorm or activation."""
    user, norm = sole_user(node), norm_behind(node)
    if norm is not None:
        node, user = norm.node, sole_user(norm.node)
    if user is not None and _is_activation(user):
        return user
    return node


def source_of(node: fx.Node) -> fx.Node:
    """The node whose values `node` only moves; `node` itself if it computes."""
    while _only_moves(node):
        node = values_into(node)[0]
    return node


def quantizable(graph: fx.GraphModule) -> set[str]:
    """Names of the layers that a runtime can compute in integers: those with a node and with torch's own `forward`.

    A layer with forward hooks may have other inputs and outputs than its weight suggests.
    """
    called = {cast("str", node.target): layer_of(node) for node in graph.graph.nodes if node.op == "call_module"}
    return {name for name, layer in called.items() if isinstance(layer, Layer) and is_plain(layer)}


def _is_a(node: fx.Node, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether `node` calls a module of one of these kinds with torch's own forward method."""
    module = layer_of(node)
    return isinstance(module, kinds) and is_plain(module)


def _is_layer(node: fx.Node, layers: set[str]) -> bool:
    return node.op == "call_module" and node.target in layers


def _is_activation(node: fx.Node) -> bool:
    return operator_name(node) in _ACTIVATION_OPERATORS or _is_a(node, _ACTIVATIONS)


def _is_addition(node: fx.Node) -> bool:
    return operator_name(node) in _ADDITIONS


def _joins(node: fx.Node) -> bool:
    """Whether `node` adds, multiplies, concatenates or averages tensors, for which runtimes have integer operators."""
    name = operator_name(node)
    if name in _AVERAGES or _is_a(node, _AVERAGE_MODULES):
        return True
    return name in CONCATENATIONS or (name in _JOINS and len(values_into(node)) > 1)


def _is_factor_of_silu(node: fx.Node) -> bool:
    """Whether `node` is the sigmoid in x sigmoid(x)."""
    product = sole_user(node)
    if operator_name(node) != "sigmoid" or product is None:
        return False
    return operator_name(product) in ("mul", "mul_") and set(values_into(product)) == {node, *values_into(node)}


def _only_moves(node: fx.Node) -> bool:
    """Whether `node` returns the values of its first input in another place or shape, or split."""
    return _is_mover(node) or is_nothing_in_eval(node) or operator_name(node) in _SPLITTERS


def is_nothing_in_eval(node: fx.Node) -> bool:
    """Whether `node` returns its input in eval mode; in training, its output is not on the input's grid."""
    return operator_name(node) in _NOTHING_IN_EVAL or _is_a(node, _NOTHING_IN_EVAL_MODULES)


def entering(node: fx.Node) -> fx.Node:
    """The first input of `node`, looking through nodes that do nothing in eval mode."""
    return computed(values_into(node)[0])


def computed(value: fx.Node) -> fx.Node:
    """`value`, looking through nodes that do nothing in eval mode."""
    while is_nothing_in_eval(value):
        value = values_into(value)[0]
    return value


def _is_mover(node: fx.Node) -> bool:
    """Whether `node` returns the values of its first input as one tensor in another place or shape."""
    name = operator_name(node)
    if name == "pad":
        return _pads_with_values_of_the_grid(node)
    if name == "getitem":  # of several results, which are known to be on one grid only after a split
        return operator_name(node.all_input_nodes[0]) in _SPLITTERS
    return name in _MOVERS or _is_a(node, _MOVER_MODULES)


def _pads_with_values_of_the_grid(node: fx.Node) -> bool:
    return arguments(node)["mode"] != "constant" or pads_with_zeros(node)


def pads_with_zeros(padding: fx.Node) -> bool:
    """Whether a call of `pad` writes zeros."""
    given = arguments(padding)
    return given["mode"] == "constant" and given["value"] in (None, 0)


def _read_in_integers(node: fx.Node, integer: list[fx.Node]) -> bool:
    """Whether an integer operator reads `node`, directly or through nodes that only move it."""
    return any(user in integer or (_only_moves(user) and _read_in_integers(user, integer)) for user in node.users)
