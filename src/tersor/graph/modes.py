"""How a captured network differs from the user's network in training, and random numbers in eval mode."""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Container, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import FunctionType

import torch
from torch import fx, nn
from torch._ops import OpOverload

from tersor.graph.aten import arguments, operator_name, place_of
from tersor.graph.layer_restoration import calls_of
from tersor.graph.stack_traces import frames_in, place_in

LOST, RANDOM = "lost_in_training", "random_numbers"
"""Keys in a captured network's `meta`: notes, and the line that draws random numbers."""

_RATES = ("p", "drop_prob", "drop_rate")
_KEPT = ("dropout", "batch_norm")
"""Functions whose modules are restored, or have a note of their own."""
_OF_BATCH_NORM = ("bn_training", "exponential_average_factor", "num_batches_tracked")
"""Names in torch's own forward method of BatchNorm, which subclasses copy."""
_SHOWN = 2
"""Most modules that a note lists."""
_SWITCHES = ("train", "training", "dropout_p")
"""Arguments that are false or 0 where an operator draws no random numbers."""


def lost_in_training(model: nn.Module, graph: fx.Graph) -> list[str]:
    """Notes on modules of `model` that do something in training which its `graph` does not contain."""
    called = {path for node in graph.nodes for _, path in calls_of(node)}
    own = {path: each for path, each in model.named_modules() if not type(each).__module__.startswith("torch.nn.")}
    inactive = [path for path, each in own.items() if path not in called and _drops(each)]
    switching = [path or type(each).__name__ for path, each in own.items() if type(each).train is not nn.Module.train]
    notes: list[str] = []
    if inactive:
        notes.append(
            f"the compressed network trains without stochastic depth ({_all(inactive)}), because its graph was "
            "recorded in eval mode"
        )
    if dropping := [path for path, each in model.named_modules() if _drops_within(each)]:
        notes.append(
            f"the compressed network trains without the dropout of {_all(dropping)}, because its graph was recorded in "
            "eval mode"
        )
    if switching:
        notes.append(
            f"the compressed network does not use the custom train() of {_all(switching)}: layers that train() would "
            "keep in eval mode, such as BatchNorm, run in training mode"
        )
    if functional := [path for node in graph.nodes if (path := _switched_batch_norm(node, own)) is not None]:
        notes.append(
            f"the compressed network keeps F.batch_norm of {_all(functional)} in eval mode: in training it uses the "
            "running statistics and does not update them. Use a BatchNorm module"
        )
    notes += [
        f"the compressed network trains with the code for eval mode, although the forward method of {_all(paths)} "
        f"reads self.training ({line})"
        for line, paths in _readers_of_mode(own, called).items()
    ]
    return notes


def _readers_of_mode(modules: Mapping[str, nn.Module], called: Container[str]) -> dict[str, list[str]]:
    """The paths of the modules by the line of their code that reads `self.training`."""
    found: dict[str, list[str]] = {}
    for path, module in modules.items():
        if _rates(module) and not (path in called and _drops(module)):
            continue
        lines = [line for line, rate in _reads_of_training(type(module)) if not _is_zero(module, rate)]
        if lines:
            found.setdefault(lines[0], []).append(path or type(module).__name__)
    return found


@cache
def _reads_of_training(kind: type[nn.Module]) -> list[tuple[str, str | None]]:
    """`file.py, line 12` of each `self.training` in the forward methods of a class whose effect capture loses.

    If it selects a rate, as in `self.drop if self.training else 0.0`, the name of this rate is beside it.
    """
    found: list[tuple[str, str | None]] = []
    for each in _reached(kind):
        try:
            lines, first = inspect.getsourcelines(each)
            tree = ast.parse(textwrap.dedent("".join(lines)))
        except (OSError, SyntaxError):
            continue
        file = Path(each.__code__.co_filename).name
        reads = _reads(tree, None, {**each.__globals__, "self": kind})
        found += [(f"{file}, line {first + line - 1}", rate) for line, rate in reads]
    return found


def _reached(kind: type[nn.Module]) -> list[FunctionType]:
    """The forward methods of a class, without torch's own, and the methods whose names they contain."""
    defined = {name: each for base in reversed(kind.__mro__) for name, each in vars(base).items()}
    methods = {
        name: each
        for name, each in defined.items()
        if isinstance(each, FunctionType) and not str(each.__module__).startswith("torch.nn.")
    }
    waiting = [name for name in methods if name.lstrip("_").startswith("forward")]
    reached: dict[str, FunctionType] = {}
    while waiting:
        name = waiting.pop(0)
        if name in methods and name not in reached:
            reached[name] = methods[name]
            waiting += methods[name].__code__.co_names
    return list(reached.values())


def _reads(node: ast.AST, rate: str | None, names: Mapping[str, object]) -> Iterator[tuple[int, str | None]]:
    """Line and rate of each `self.training` below `node`, without those that capture keeps or that change nothing."""
    if isinstance(node, ast.Attribute) and node.attr == "training":
        yield node.lineno, rate
    if isinstance(node, ast.Call) and _is_kept(node.func, names):
        return
    if isinstance(node, ast.If | ast.IfExp) and "checkpoint" in ast.unparse(node.test):
        return  # saves memory
    if isinstance(node, ast.If | ast.Assign) and _prepares_batch_norm(node):
        return
    if isinstance(node, ast.IfExp):
        rates = [each for each in (node.body, node.orelse) if not isinstance(each, ast.Constant)]
        rate = ast.unparse(rates[0]).removeprefix("self.") if len(rates) == 1 else None
    for child in ast.iter_child_nodes(node):
        yield from _reads(child, rate, names)


def _prepares_batch_norm(node: ast.stmt) -> bool:
    """Whether a statement only sets what BatchNorm's forward method passes to F.batch_norm."""
    if isinstance(node, ast.If):
        return all(map(_prepares_batch_norm, [*node.body, *node.orelse]))
    return any(name in ast.unparse(node) for name in _OF_BATCH_NORM)


def _is_kept(called: ast.expr, names: Mapping[str, object]) -> bool:
    """Whether a call is of a function that capture keeps, or of one that calls such a function."""
    name = ast.unparse(called)
    if "alpha_dropout" in name:
        return False
    if any(kept in name for kept in _KEPT):
        return True
    first, *others = name.split(".")
    try:
        function = operator.attrgetter(".".join(others))(names[first]) if others else names[first]
        code = inspect.getsource(function)  # pyright: ignore[reportArgumentType]
    except (KeyError, AttributeError, OSError, TypeError):
        return False
    return isinstance(function, FunctionType) and any(f".{kept}(" in code for kept in _KEPT)


def _is_zero(module: nn.Module, name: str | None) -> bool:
    """Whether an attribute is the number 0, such as a drop rate."""
    try:
        value = operator.attrgetter(name)(module) if name else None
    except AttributeError:
        return False
    return isinstance(value, int | float) and value == 0


def computed_in_forward(model: nn.Module, captured: nn.Module) -> list[str]:
    """A note on weights that the forward method of `model` computes, and that are plain weights when `captured`."""
    own = set(model.parameters())
    layers = [name.rpartition(".")[0] for name, parameter in captured.named_parameters() if parameter not in own]
    if not layers:
        return []
    shown = _all(list(dict.fromkeys(layers)))
    note = (
        f"the compressed network trains the weights of {shown} directly, although the forward method computes them (as "
        "in weight standardization, low-rank adapters, or binary weights). Train first, then compress"
    )
    return [note]


def _switched_batch_norm(node: fx.Node, own: Mapping[str, nn.Module]) -> str | None:
    """The path of the module whose code calls this F.batch_norm and reads `self.training`; None for other nodes."""
    path = place_of(node)
    if operator_name(node) != "batch_norm" or path not in own:
        return None
    code = getattr(type(own[path]).forward, "__code__", None)
    return (path or type(own[path]).__name__) if code is None or "training" in code.co_names else None


def _drops(module: nn.Module) -> bool:
    return any(each > 0 for each in _rates(module))


def _drops_within(module: nn.Module) -> bool:
    """Whether it is attention or a recurrent layer with dropout, which the graph contains in parts."""
    if isinstance(module, nn.RNNBase):
        return module.num_layers > 1 and module.dropout > 0
    return isinstance(module, nn.MultiheadAttention) and module.dropout > 0


def _rates(module: nn.Module) -> list[float]:
    """The drop rates of a module without parameters, such as stochastic depth."""
    rates = [vars(module).get(name) for name in _RATES]
    return [each for each in rates if isinstance(each, float) and next(module.parameters(), None) is None]


def _all(paths: list[str]) -> str:
    return " and ".join(paths) if len(paths) <= _SHOWN else f"{paths[0]}, ..., {paths[-1]} ({len(paths)} in all)"


def random_numbers(graph: fx.Graph) -> str | None:
    """` (file.py, line 12: x + torch.rand(1))` for the first operator that draws random numbers, None if none does.

    Empty if the line is unknown.
    """
    for node in graph.nodes:
        if isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            given = arguments(node)
            if all(given.get(name, True) for name in _SWITCHES):
                return place_in(frames_in(node.meta.get("stack_trace") or ""))
    return None


def training_notes(model: nn.Module) -> tuple[str, ...]:
    """Lines for the user about what a captured network no longer does in training."""
    return tuple(model.meta.get(LOST, ())) if isinstance(model, fx.GraphModule) else ()
