"""A network -> its graph, over the same Parameter objects and with the same keys (torch.fx).

`torch.export` refuses `train()`, so a captured network could not be trained on; `torch.fx` keeps modules as modules.
Its own tracer goes wrong in silence where a module reads `self.training` (stochastic depth, dropout): the mode of the
moment becomes a constant. So a network is traced in both modes; if the graphs differ, the modules that read
`self.training` stay leaves. What the outermost module itself decides by it (auxiliary heads of GoogLeNet and
Inception) is traced as in eval: these heads are not part of what is compressed.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from typing import cast

from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.nn.utils import parametrize

from tersor.core.errors import InputError


class Tracer(fx.Tracer):
    """Keeps as leaves: torch's own layers, modules with parameters of their own, parametrized ones; and, if asked,
    those that read `self.training`. Everything else is traced through.
    """

    proxy_buffer_attributes = True

    def __init__(self, *, training_readers_are_leaves: bool) -> None:
        super().__init__()
        self.training_readers_are_leaves = training_readers_are_leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether `m` becomes one node."""
        if isinstance(m, nn.Sequential | nn.ModuleList):
            return False
        childless = next(m.children(), None) is None
        own_tensors = any(True for _ in m.parameters(recurse=False)) or any(True for _ in m.buffers(recurse=False))
        torch_layer = type(m).__module__.startswith("torch.nn.")
        return (
            torch_layer
            or parametrize.is_parametrized(m)
            or (childless and own_tensors)
            or (self.training_readers_are_leaves and _reads_training(m))
        )


def capture(model: nn.Module) -> fx.GraphModule:
    """The graph of `model`, as a module that trains, loads and saves like it.

    Raises:
        InputError: the forward depends on its input's values, or does what torch.fx cannot follow.
    """
    if isinstance(model, fx.GraphModule):
        return model
    with _modes_restored(model):
        graphs = {mode: _trace(model.train(mode), leaves=False) for mode in (True, False)}
        graph = graphs[False]
        if str(graphs[True]) != str(graph):
            graph = _trace(model.eval(), leaves=True)
    captured = fx.GraphModule(model, graph, class_name=type(model).__name__)
    captured.train(model.training)
    for name, module in model.named_modules():
        if name and name in dict(captured.named_modules()):
            captured.get_submodule(name).training = module.training
    return captured


def _trace(model: nn.Module, *, leaves: bool) -> fx.Graph:
    try:
        return Tracer(training_readers_are_leaves=leaves).trace(model)
    except (TraceError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"the graph of {type(model).__name__} cannot be captured: {error} "
            "Possible: a forward without branches on the values of tensors (torch.fx traces it)."
        ) from error


def _reads_training(module: nn.Module) -> bool:
    try:
        source = inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return False
    return "self.training" in source


@contextmanager
def _modes_restored(model: nn.Module) -> Generator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def layer_of(node: fx.Node) -> nn.Module | None:
    """The module that a `call_module` node calls, or None for any other node."""
    if node.op != "call_module":
        return None
    owner = node.graph.owning_module
    assert owner is not None
    return owner.get_submodule(cast("str", node.target))


def sole_user(node: fx.Node) -> fx.Node | None:
    """The only node that reads `node`, or None where there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None
