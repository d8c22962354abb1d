"""Layers in place of operators: the graph that torch.export records gets torch.nn modules over the same Parameters.

    aten.conv2d(x, conv1_weight, None, [1, 1], [1, 1])    ->    conv1(x)

A module with torch's own `forward` stays the object that it was. An operator that a network's own code computes with a
weight (a subclass, `F.linear(x, self.weight)`, the fused projection of attention) gets a new layer over that weight, so
that it can be pruned and quantized. torch.export runs a network in eval mode; the restored modules train as in PyTorch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.instancenorm import _InstanceNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.utils import parametrize

from tersor.graph.aten import arguments, operator_name, place_of
from tersor.graph.computed_weights import computed_weight, source_of
from tersor.graph.dead_code import remove_unused
from tersor.graph.dropout_calls import never_drops
from tersor.graph.eval_mode import required_inputs
from tersor.graph.plain_modules import is_plain

_CONVOLUTIONS: dict[str, type[nn.Module]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}
_NORMS: dict[int, type[nn.modules.batchnorm._BatchNorm]] = {  # pyright: ignore[reportPrivateUsage]
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
_IN_PARTS = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Transformer, nn.Sequential, nn.SiLU)
_GEOMETRY = ("stride", "padding", "dilation", "output_padding")

Call = tuple[str, str]
"""A call of a module: key that differs between calls, and path of the module."""


def restore_layers(graph: fx.GraphModule, model: nn.Module) -> dict[str, nn.Module]:
    """Replace operators in `graph` by calls of layers; returns all modules that it calls, by path.

    Args:
        graph: recorded by torch.export from a copy of `model`; it is changed.
        model: the network whose modules and Parameters are used.
    """
    return _Restoration(graph, model).run()


def calls_of(node: fx.Node) -> list[Call]:
    """The running modules when `node` was recorded, the outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(key, path) for key, (path, _) in stack.items() if not key.startswith("_empty")]


class _Restoration:
    def __init__(self, graph: fx.GraphModule, model: nn.Module) -> None:
        self.recorded, self.graph, self.model = graph, graph.graph, model
        self.graph.owning_module = None  # it has no such modules yet
        self.called = {name: each for name, each in graph.named_children() if name.startswith("container")}
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.numbers = count()
        self.computed: dict[str, nn.Parameter | None] = {}
        self.paths: dict[nn.Parameter, str] = {}

    def run(self) -> dict[str, nn.Module]:
        for nodes in list(self._groups()):
            self._as_module(nodes)
        rules: dict[str, Callable[[fx.Node, dict[str, Any]], None]] = {
            **dict.fromkeys(_CONVOLUTIONS, self._convolution),
            "linear": self._linear,
            "batch_norm": self._batch_norm,
            "group_norm": self._group_norm,
            **dict.fromkeys(("dropout", "dropout_", "feature_dropout", "feature_dropout_"), self._dropout),
        }
        for node in list(self.graph.nodes):
            if rule := rules.get(operator_name(node)):
                rule(node, arguments(node))
        remove_unused(self.graph)
        return self.called

    def _groups(self) -> Iterator[list[fx.Node]]:
        """The operators of every call of a module with torch's own forward method."""
        groups: dict[str, list[fx.Node]] = {}
        for node in self.graph.nodes:
            calls = calls_of(node) if node.op == "call_function" else []
            if calls and self._stays(calls[-1][1]):
                groups.setdefault(calls[-1][0], []).append(node)
        yield from groups.values()

    def _stays(self, path: str) -> bool:
        module = self.modules.get(path)
        if module is None or not path or isinstance(module, _IN_PARTS) or _is_without_tensors(module):
            return False
        kind = parametrize.type_before_parametrizations(module)
        of_torch = any(each.__module__.startswith("torch.nn.") and each is not nn.Module for each in kind.__mro__)
        parts = [name for name, _ in module.named_children() if name != "parametrizations"]
        return of_torch and not parts and is_plain(module) and len(required_inputs(module)) == 1

    def _as_module(self, nodes: list[fx.Node]) -> None:
        """Replace the operators of one call by a `call_module` node, if the module reads and returns one tensor."""
        path, inside = calls_of(nodes[0])[-1][1], set(nodes)
        own = f"{path}."
        inputs = [each for node in nodes for each in node.all_input_nodes if each not in inside]
        inputs = [each for each in dict.fromkeys(inputs) if not (each.op == "get_attr" and _below(each, own))]
        tensors = [each for each in inputs if isinstance(each.meta.get("val"), Tensor) or each.op != "call_function"]
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        if len(tensors) != 1 or len(outputs) != 1 or outputs[0] is not nodes[-1]:
            return
        module = self.modules[path]
        if isinstance(module, nn.modules.conv._ConvTransposeNd) and not _same_padding(nodes, module):  # pyright: ignore[reportPrivateUsage]
            return
        self._replace(nodes[-1], path, module, tensors[0])
        for node in reversed(nodes[:-1]):
            self.graph.erase_node(node)

    def _replace(self, node: fx.Node, path: str, module: nn.Module, value: fx.Node) -> fx.Node:
        self.called[path] = module
        with self.graph.inserting_before(node):
            call = self.graph.call_module(path, (value,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        self.graph.erase_node(node)
        return call

    def _convolution(self, node: fx.Node, given: dict[str, Any]) -> None:
        weight, bias = self._learned(node, "weight"), self._learned(node, "bias")
        if weight is None or (given["bias"] is not None and bias is None):
            return
        kind, groups = _CONVOLUTIONS[operator_name(node)], given["groups"]
        sides = (weight.shape[0], weight.shape[1] * groups)
        inputs, outputs = sides if "transpose" in operator_name(node) else sides[::-1]
        rank = weight.ndim - 2
        geometry = {key: _sized(given[key], rank) for key in _GEOMETRY if key in given}
        layer = _empty(kind, inputs, outputs, tuple(weight.shape[2:]), groups=groups, bias=bias is not None, **geometry)
        self._put(node, given, layer, weight, bias)

    def _linear(self, node: fx.Node, given: dict[str, Any]) -> None:
        weight, bias = self._learned(node, "weight"), self._learned(node, "bias")
        if weight is None or weight.ndim != 2:
            return
        layer = _empty(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None)
        added = given["bias"] if bias is None else None  # a bias that depends on the images is added after the layer
        call = self._put(node, given, layer, weight, bias)
        if added is not None and call is not None:
            with self.graph.inserting_after(call):
                total = self.graph.call_function(torch.ops.aten.add.Tensor, (call, added))
            total.meta = dict(call.meta)
            call.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)

    def _put(
        self, node: fx.Node, given: dict[str, Any], layer: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None
    ) -> fx.Node | None:
        """Call `layer` over `weight` and `bias` in place of an operator."""
        path = self.paths.setdefault(weight, self._path(node, given))
        known = self.called.get(path)
        layer.register_parameter("weight", weight)
        layer.register_parameter("bias", bias)
        layer.train(self._owner(path).training)
        if known is None:
            known = layer
        elif known.weight is not weight or known.bias is not bias or not _is_alike(known, layer):
            return None  # the same weight in another kind of layer, or with another geometry, stays an operator
        return self._replace(node, path, known, given["input"])

    def _path(self, node: fx.Node, given: dict[str, Any]) -> str:
        """Where a new layer goes: in place of a module that holds its weight and bias, or else beside the weight.

        What the graph computes has no key of the network, so that loading the network's own weights cannot replace it.
        """
        if given["weight"].op != "get_attr":
            return f"{calls_of(node)[-1][1]}.{node.name}".lstrip(".")
        weight = str(given["weight"].target)
        owner, _, name = weight.rpartition(".")
        bias_is_own = given["bias"] is None or given["bias"].op == "get_attr"
        if name == "weight" and owner and bias_is_own and self._holds_only_a_layer(owner):
            return owner
        path = weight.removesuffix("_weight")
        return path if path != weight and path not in self.modules else f"{weight}_layer"

    def _holds_only_a_layer(self, owner: str) -> bool:
        module = self.modules[owner]
        return {name for name, _ in module.named_parameters(recurse=False)} <= {"weight", "bias"}

    def _owner(self, path: str) -> nn.Module:
        while path not in self.modules:
            path = path.rpartition(".")[0]
        return self.modules[path]

    def _batch_norm(self, node: fx.Node, given: dict[str, Any]) -> None:
        mean, var = self._tensor(given["running_mean"]), self._tensor(given["running_var"])
        path = str(getattr(given["running_mean"], "target", "")).rpartition(".")[0]
        owner = self.modules.get(path)
        if mean is None or var is None or not isinstance(owner, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
            return
        weight, bias = self._parameter(given["weight"]), self._parameter(given["bias"])
        if (weight is None) != (given["weight"] is None) or (bias is None) != (given["bias"] is None):
            return  # a computed weight, such as 1 + weight
        layer = self.called.get(path)
        if layer is None:
            kind = _NORMS[node.meta["val"].ndim]
            layer = _empty(kind, len(mean), given["eps"], owner.momentum, affine=given["weight"] is not None)
            layer.weight, layer.bias = weight, bias
            for name, buffer in owner.named_buffers(recurse=False):
                layer.register_buffer(name, buffer, persistent=name in owner.state_dict())
            layer.train(owner.training)
        self._replace(node, path, layer, given["input"])

    def _group_norm(self, node: fx.Node, given: dict[str, Any]) -> None:
        weight, bias = self._parameter(given["weight"]), self._parameter(given["bias"])
        if weight is None or bias is None:
            return
        layer = _empty(nn.GroupNorm, given["num_groups"], len(weight), given["eps"])
        self._put(node, given, layer, weight, bias)

    def _dropout(self, node: fx.Node, given: dict[str, Any]) -> None:
        """A module, so that it drops in training; in `F.dropout(x, training=True)` the operator stays."""
        if given["train"]:
            return
        value = next(iter(given.values()))
        if never_drops(node, self.modules.get(place_of(node), self.model)):
            node.replace_all_uses_with(value)
            self.graph.erase_node(node)
            return
        kind = nn.Dropout2d if operator_name(node).startswith("feature") else nn.Dropout
        path = next(path for number in self.numbers if (path := f"dropout_{number}") not in self.modules)
        self._replace(node, path, kind(given["p"]).train(self.model.training), value)

    def _tensor(self, node: object) -> Tensor | None:
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(self.modules.get(owner), name, None)
        return value if isinstance(value, Tensor) else None

    def _learned(self, reader: fx.Node, name: str) -> nn.Parameter | None:
        """The Parameter that an operator reads, or a new one with what the graph computes from Parameters alone."""
        node = arguments(reader)[name]
        if isinstance(node, fx.Node) and node.op != "get_attr":
            source = source_of(node)  # a layer that is called twice computes its weight twice
            if source not in self.computed:
                self.computed[source] = computed_weight(node, reader, self._attribute, self.called)
            return self.computed[source]
        return self._parameter(node)

    def _attribute(self, path: str) -> Any:
        owner, _, name = path.rpartition(".")
        known = hasattr(self.modules.get(owner), name)
        return getattr(self.modules[owner], name) if known else operator.attrgetter(path)(self.recorded)

    def _parameter(self, node: object) -> nn.Parameter | None:
        value = self._tensor(node)
        return value if isinstance(value, nn.Parameter) else None


def _is_without_tensors(module: nn.Module) -> bool:
    """Whether this is an InstanceNorm whose number of channels only its attribute has."""
    return isinstance(module, _InstanceNorm) and not [*module.parameters(), *module.buffers()]


def _is_alike(known: nn.Module, layer: nn.Module) -> bool:
    return isinstance(known, type(layer)) and known.extra_repr() == layer.extra_repr()


def _below(node: fx.Node, own: str) -> bool:
    return str(node.target).startswith(own)


def _same_padding(nodes: list[fx.Node], module: nn.modules.conv._ConvTransposeNd) -> bool:  # pyright: ignore[reportPrivateUsage]
    """Whether the call has no `output_size` that changes the padding."""
    given = next(arguments(node) for node in nodes if operator_name(node) in _CONVOLUTIONS)
    return _sized(given["output_padding"], len(module.output_padding)) == tuple(module.output_padding)


def _sized(value: Any, rank: int) -> Any:
    """A size for each dimension; "same" and "valid" stay words."""
    if isinstance(value, str):
        return value
    sizes = tuple(value)
    return sizes * rank if len(sizes) == 1 else sizes


def _empty(kind: type[nn.Module], *positional: Any, **options: Any) -> Any:
    """A module without memory for its tensors, which are assigned afterwards."""
    with torch.device("meta"):
        return cast("Any", kind(*positional, **options))
