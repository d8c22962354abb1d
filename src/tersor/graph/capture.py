"""Capture: a network -> its graph (torch.fx), with the same Parameter objects and the same keys.

`torch.export` refuses `train()`, so an exported network could not be trained; `torch.fx` keeps modules as modules. Its
own tracer silently fixes the mode if a module reads `self.training` (stochastic depth, dropout). Therefore `training`
is a value of the graph during tracing: code that only passes it on (`F.dropout(x, training=self.training)`) is traced;
a module that branches on it is traced in both modes, and becomes a leaf unless both traces are equal (attention without
dropout). The outermost module's own branches are traced in eval mode: the auxiliary heads of GoogLeNet and Inception
are not part of the compressed network.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter, OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

from torch import fx, nn
from torch.fx.proxy import Proxy, TraceError
from torch.nn.utils import parametrize

from tersor.core.errors import InputError
from tersor.graph.batchnorm import Norm
from tersor.graph.eval_mode import modes_restored
from tersor.graph.plain_modules import is_hooked
from tersor.graph.split_norms import split_norms

_UNTRACEABLE = (TraceError, TypeError, ValueError, RuntimeError, AttributeError, NameError, SyntaxError)
_CONTAINERS = (list, dict, OrderedDict, set)
_NAMES_OF_A_GRAPH = {*dir(fx.GraphModule(nn.Module(), fx.Graph()))} - {*dir(nn.Module())}


class _BranchesOnModeError(Exception):
    """A module branches on its mode; its class becomes a leaf if training and eval mode run different code."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(type(module).__name__)
        self.module = module


class Tracer(fx.Tracer):
    """Traces through everything but leaves: torch's layers, modules with parameters of their own, parametrized modules
    and the classes `leaves`.
    """

    proxy_buffer_attributes = True

    def __init__(self, leaves: set[type[nn.Module]]) -> None:
        super().__init__()
        self.leaves = leaves
        self._modes: dict[fx.Node, nn.Module] = {}
        self._assumed: dict[nn.Module, bool] = {}
        self._read: dict[str, Proxy] = {}
        self.returned: dict[str, fx.Node] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether `m` becomes one node."""
        if type(m) in self.leaves:
            return True
        if isinstance(m, nn.Sequential | nn.ModuleList):
            return False
        if isinstance(m, Norm):  # also one with children, which may be split
            return True
        childless = next(m.children(), None) is None
        own_tensors = any(True for _ in m.parameters(recurse=False)) or any(True for _ in m.buffers(recurse=False))
        torch_layer = type(m).__module__.startswith("torch.nn.")
        return torch_layer or parametrize.is_parametrized(m) or (childless and own_tensors)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The placeholders of the inputs, followed by the mode of the outermost module."""
        inputs = super().create_args_for_root(root_fn, is_module, concrete_args)
        self._trace_mode(self.root, "training")
        return inputs

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Adds one node for a leaf, or enters the module, with its mode as a value of the graph."""
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            self._trace_mode(m, f"{path}.training")
        before, stack = len(self.graph.nodes), self.module_stack.copy()
        try:
            result = super().call_module(m, forward, args, kwargs)
        except _BranchesOnModeError as branch:
            if branch.module is not m:
                raise
            made: list[Any] = []
            for assumed in (True, False):
                self._forget(before, stack)
                self._assumed[m] = assumed
                try:
                    result = super().call_module(m, forward, args, kwargs)
                except _UNTRACEABLE:
                    raise branch from None
                made.append(self._made(before))
            if made[0] != made[1]:
                raise
        if isinstance(result, Proxy):
            self.returned[path] = result.node
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """As in torch.fx; also remembers the nodes of parameters that have been read."""
        self._read = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _forget(self, before: int, stack: Any) -> None:
        """Removes all nodes but the first `before`."""
        for node in reversed(list(self.graph.nodes)[before:]):
            self._modes.pop(node, None)
            self.graph.erase_node(node)
        for path in [path for path, proxy in self._read.items() if proxy.node not in self.graph.nodes]:
            del self._read[path]
        self.module_stack = stack.copy()

    def _made(self, before: int) -> list[Any]:
        """A comparable form of all nodes but the first `before`."""
        nodes = list(self.graph.nodes)
        number = {node: place for place, node in enumerate(nodes)}
        return [
            (node.op, node.target, fx.map_arg((node.args, node.kwargs), lambda read: f"node {number[read]}"))
            for node in nodes[before:]
        ]

    def _trace_mode(self, module: nn.Module, name: str) -> None:
        mode = self.create_proxy("get_attr", name, (), {})
        self._modes[mode.node] = module
        module.training = cast("bool", mode)

    def to_bool(self, obj: Proxy) -> bool:
        """A mode is False in the outermost module, and elsewhere the one that is assumed for comparing both modes."""
        module = self._modes.get(obj.node)
        if module is None:
            return super().to_bool(obj)
        if module is self.root:
            return False
        if module in self._assumed:
            return self._assumed[module]
        raise _BranchesOnModeError(module)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph without unused modes."""
        graph = super().trace(root, concrete_args)
        for node in self._modes:
            if not node.users:
                graph.erase_node(node)
        return graph


class _Captured(fx.GraphModule):
    """Copies keep which buffers are not persistent, which those of a GraphModule lose before torch 2.14."""

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        copied = super().__deepcopy__(memo)
        originals = dict(self.named_modules())
        for path, module in copied.named_modules():  # `strip` copies fewer modules
            if path in originals:
                unsaved = originals[path]._non_persistent_buffers_set
                module._non_persistent_buffers_set |= unsaved & module._buffers.keys()
        return copied


def capture(model: nn.Module) -> fx.GraphModule:
    """Capture the graph of `model` as a module that trains, loads and saves like it.

    `meta["layers"]` maps the path of every called module to the node of its output.

    Raises:
        InputError: the forward depends on the values of its input, or does something that torch.fx does not support.
    """
    if isinstance(model, fx.GraphModule):
        return model
    _require_traceable(model)
    with _attributes_restored(model):
        with modes_restored(model):
            graph, returned = _trace(model)
        captured = _compiled(model, graph)
    split = split_norms(captured)
    captured.meta["layers"] = {path: split.get(node.name, node.name) for path, node in returned.items()}
    for key in captured.state_dict().keys() - model.state_dict().keys():
        path, _, name = key.rpartition(".")
        owner = captured.get_submodule(path)
        owner.register_buffer(name, getattr(owner, name), persistent=False)  # constants are not saved
    for name, module in captured.named_modules():
        module.training = model.get_submodule(name).training
    return captured


def _trace(model: nn.Module) -> tuple[fx.Graph, dict[str, fx.Node]]:
    leaves: set[type[nn.Module]] = set()
    while True:
        tracer = Tracer(leaves)
        try:
            return tracer.trace(model), tracer.returned
        except _BranchesOnModeError as branch:
            leaves.add(type(branch.module))
        except _UNTRACEABLE as error:
            advice = "a forward without branches on the values of tensors (torch.fx traces it)."
            if isinstance(error, NameError):
                advice = "modules created in __init__, each with a name; a slice of a Sequential is a new module."
            message = f"the graph of {type(model).__name__} cannot be captured: {str(error).rstrip('. ')}"
            raise InputError(f"{message}. Possible: {advice}") from error


def _compiled(model: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    try:
        return _Captured(model, graph, class_name=type(model).__name__)
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise InputError(
            f"the graph of {type(model).__name__} cannot be captured: the name of a submodule is a Python keyword "
            f"({line}). Rename that submodule."
        ) from error


@contextmanager
def _attributes_restored(model: nn.Module) -> Generator[None]:
    """Restores every attribute that the forwards set while they are traced, and the contents of lists and dicts.

    A forward that stores its results (`self.attention = weights`) would store a node of the graph; tracing itself
    stores the tensors that a forward creates.
    """
    saved = [(vars(module), dict(vars(module))) for module in model.modules()]
    contents = [
        (value, copy.copy(value)) for _, before in saved for value in before.values() if type(value) in _CONTAINERS
    ]
    try:
        yield
    finally:
        for attributes, before in saved:
            for name in attributes.keys() - before.keys():
                del attributes[name]
            attributes.update(before)
        for value, before in contents:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(before)


def _require_traceable(model: nn.Module) -> None:
    """Refuses what tracing would silently ignore, and reserved names.

    Raises:
        InputError: a forward set on the instance, hooks on the outermost module, or a part with a reserved name.
    """
    kind = type(model).__name__
    if "forward" in vars(model) or is_hooked(model):
        raise InputError(
            f"the graph of {kind} cannot be captured: a forward was set on the instance, or forward hooks are "
            "registered on it, and the graph would lose them. Define the forward in a class; remove the hooks."
        )
    names = {name for part in ("_modules", "_parameters", "_buffers") for name in vars(model)[part]}
    if taken := sorted(names & _NAMES_OF_A_GRAPH):
        raise InputError(
            f"{kind} has an attribute named '{taken[0]}', which is reserved in a captured graph. Rename it, for "
            f"example to '{taken[0]}_'."
        )


def layer_of(node: fx.Node) -> nn.Module | None:
    """The module that a `call_module` node calls, or None for any other node."""
    if node.op != "call_module":
        return None
    owner = node.graph.owning_module
    assert owner is not None
    return owner.get_submodule(cast("str", node.target))


def values_into(node: fx.Node) -> list[fx.Node]:
    """The inputs of `node` without the modes of modules."""
    return [value for value in node.all_input_nodes if not _is_mode(value)]


def _is_mode(node: fx.Node) -> bool:
    return node.op == "get_attr" and f".{node.target}".endswith(".training")


def parameter_reads(graph: fx.GraphModule) -> Counter[int]:
    """The number of nodes that read each Parameter, by its id: layers may be called twice, or share a weight."""
    found: Counter[int] = Counter()
    for node in graph.graph.nodes:
        module = layer_of(node)
        if module is not None:
            found.update(map(id, module.parameters()))
        elif node.op == "get_attr":
            found[id(operator.attrgetter(node.target)(graph))] += 1
    return found


def sole_user(node: fx.Node) -> fx.Node | None:
    """The only node that reads `node`; None if there is none, or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None
