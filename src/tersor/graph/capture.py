"""A network -> its graph, over the same Parameter objects and with the same keys (torch.fx).

`torch.export` refuses `train()`, so a captured network could not be trained on; `torch.fx` keeps modules as modules.
Its own tracer goes wrong in silence where a module reads `self.training` (stochastic depth, dropout): the mode of the
moment becomes a constant. So while a network is traced, `training` is a value of the graph: what only hands it on
(`F.dropout(x, training=self.training)`) is traced; a module that branches on it is traced both ways, and becomes a leaf
unless both do the same (attention without dropout). What the outermost module itself decides by it (auxiliary heads of
GoogLeNet and Inception) is traced as in eval: these heads are not part of what is compressed.
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
from tersor.graph.plain_modules import is_hooked
from tersor.graph.split_norms import split_norms

_UNTRACEABLE = (TraceError, TypeError, ValueError, RuntimeError, AttributeError, NameError, SyntaxError)
_CONTAINERS = (list, dict, OrderedDict, set)
_NAMES_OF_A_GRAPH = {*dir(fx.GraphModule(nn.Module(), fx.Graph()))} - {*dir(nn.Module())}


class _BranchesOnModeError(Exception):
    """This module asks for its mode; where it runs other code in training than in eval, its class is a leaf."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(type(module).__name__)
        self.module = module


class Tracer(fx.Tracer):
    """Keeps as leaves: torch's own layers, modules with parameters of their own, parametrized ones, and the classes
    in `leaves`. Everything else is traced through.
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
        if isinstance(m, Norm):  # also one with parts: it is split, or stays whole
            return True
        childless = next(m.children(), None) is None
        own_tensors = any(True for _ in m.parameters(recurse=False)) or any(True for _ in m.buffers(recurse=False))
        torch_layer = type(m).__module__.startswith("torch.nn.")
        return torch_layer or parametrize.is_parametrized(m) or (childless and own_tensors)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The inputs' placeholders; behind them, the outermost module's mode."""
        inputs = super().create_args_for_root(root_fn, is_module, concrete_args)
        self._show_mode(self.root, "training")
        return inputs

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One node for a leaf; any other module is entered, with its mode as a value of the graph."""
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            self._show_mode(m, f"{path}.training")
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
        """As torch.fx has it; the nodes of parameters that were read before are remembered."""
        self._read = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _forget(self, before: int, stack: Any) -> None:
        """Takes away all nodes but the first `before`."""
        for node in reversed(list(self.graph.nodes)[before:]):
            self._modes.pop(node, None)
            self.graph.erase_node(node)
        for path in [path for path, proxy in self._read.items() if proxy.node not in self.graph.nodes]:
            del self._read[path]
        self.module_stack = stack.copy()

    def _made(self, before: int) -> list[Any]:
        """What all nodes but the first `before` do, to be compared."""
        nodes = list(self.graph.nodes)
        number = {node: place for place, node in enumerate(nodes)}
        return [
            (node.op, node.target, fx.map_arg((node.args, node.kwargs), lambda read: f"node {number[read]}"))
            for node in nodes[before:]
        ]

    def _show_mode(self, module: nn.Module, name: str) -> None:
        mode = self.create_proxy("get_attr", name, (), {})
        self._modes[mode.node] = module
        module.training = cast("bool", mode)

    def to_bool(self, obj: Proxy) -> bool:
        """Of a mode: False in the outermost module; elsewhere, what is assumed to compare both ways."""
        module = self._modes.get(obj.node)
        if module is None:
            return super().to_bool(obj)
        if module is self.root:
            return False
        if module in self._assumed:
            return self._assumed[module]
        raise _BranchesOnModeError(module)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph, without the modes that nothing reads."""
        graph = super().trace(root, concrete_args)
        for node in self._modes:
            if not node.users:
                graph.erase_node(node)
        return graph


class _Captured(fx.GraphModule):
    """Copies keep which buffers are not saved; before torch 2.14 those of a GraphModule forget it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        copied = super().__deepcopy__(memo)
        originals = dict(self.named_modules())
        for path, module in copied.named_modules():  # fewer than the originals where `strip` copies
            if path in originals:
                unsaved = originals[path]._non_persistent_buffers_set
                module._non_persistent_buffers_set |= unsaved & module._buffers.keys()
        return copied


def capture(model: nn.Module) -> fx.GraphModule:
    """The graph of `model`, as a module that trains, loads and saves like it.

    `meta["layers"]` remembers, for the path of every module that was called, the node that it gave.

    Raises:
        InputError: the forward depends on its input's values, or does what torch.fx cannot follow.
    """
    if isinstance(model, fx.GraphModule):
        return model
    _refuse_what_is_lost(model)
    with _as_found(model):
        with _modes_restored(model):
            graph, returned = _trace(model)
        captured = _compiled(model, graph)
    split = split_norms(captured)
    captured.meta["layers"] = {path: split.get(node.name, node.name) for path, node in returned.items()}
    for key in captured.state_dict().keys() - model.state_dict().keys():
        path, _, name = key.rpartition(".")
        owner = captured.get_submodule(path)
        owner.register_buffer(name, getattr(owner, name), persistent=False)  # a constant is nothing to save
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
                advice = "modules made in __init__, each under a name; a slice of a Sequential is a new module."
            told = f"the graph of {type(model).__name__} cannot be captured: {str(error).rstrip('. ')}"
            raise InputError(f"{told}. Possible: {advice}") from error


def _compiled(model: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    try:
        return _Captured(model, graph, class_name=type(model).__name__)
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise InputError(
            f"the graph of {type(model).__name__} cannot be captured: a part of it is named by a Python keyword "
            f"({line}). Give that part another name."
        ) from error


@contextmanager
def _modes_restored(model: nn.Module) -> Generator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _as_found(model: nn.Module) -> Generator[None]:
    """Puts back every attribute that the forwards set while they were traced, and what they put into lists and dicts.

    A forward that keeps what it computed (`self.attention = weights`) would keep a node of the graph; tracing itself
    keeps the tensors that a forward makes anew each time.
    """
    found = [(vars(module), dict(vars(module))) for module in model.modules()]
    held = [(value, copy.copy(value)) for _, before in found for value in before.values() if type(value) in _CONTAINERS]
    try:
        yield
    finally:
        for attributes, before in found:
            for name in attributes.keys() - before.keys():
                del attributes[name]
            attributes.update(before)
        for value, before in held:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(before)


def _refuse_what_is_lost(model: nn.Module) -> None:
    """What tracing passes over in silence, and names that a captured graph has itself.

    Raises:
        InputError: a forward of the instance or hooks on the outermost module; a part that bears such a name.
    """
    kind = type(model).__name__
    if "forward" in vars(model) or is_hooked(model):
        raise InputError(
            f"the graph of {kind} cannot be captured: a forward was set on the instance, or forward hooks are "
            "registered on it, and the graph would not have them. Write the forward in a class; remove the hooks."
        )
    names = {name for part in ("_modules", "_parameters", "_buffers") for name in vars(model)[part]}
    if taken := sorted(names & _NAMES_OF_A_GRAPH):
        raise InputError(
            f"{kind} has a part named '{taken[0]}', which a captured graph has itself. Give it another name, such as "
            f"'{taken[0]}_'."
        )


def layer_of(node: fx.Node) -> nn.Module | None:
    """The module that a `call_module` node calls, or None for any other node."""
    if node.op != "call_module":
        return None
    owner = node.graph.owning_module
    assert owner is not None
    return owner.get_submodule(cast("str", node.target))


def values_into(node: fx.Node) -> list[fx.Node]:
    """The values that `node` computes with: its inputs but for the modes of modules."""
    return [value for value in node.all_input_nodes if not _is_mode(value)]


def _is_mode(node: fx.Node) -> bool:
    return node.op == "get_attr" and f".{node.target}".endswith(".training")


def parameter_reads(graph: fx.GraphModule) -> Counter[int]:
    """How many nodes read each Parameter, by its id: a layer may be called twice, or share its weight with another."""
    found: Counter[int] = Counter()
    for node in graph.graph.nodes:
        module = layer_of(node)
        if module is not None:
            found.update(map(id, module.parameters()))
        elif node.op == "get_attr":
            found[id(operator.attrgetter(node.target)(graph))] += 1
    return found


def sole_user(node: fx.Node) -> fx.Node | None:
    """The only node that reads `node`, or None where there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None
