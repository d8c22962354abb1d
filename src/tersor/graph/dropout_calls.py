"""Calls of F.dropout with `training=False` in a forward method, which never drop.

torch.export runs a network in eval mode, so the operator of such a call equals that of
`F.dropout(x, p, self.training)`. Only the source code tells them apart. A recorded operator has the line of the forward
method that led to it. If another call on that line may drop as well, the two cannot be distinguished, and the operator
counts as active.
"""

from __future__ import annotations

import ast
import builtins
import linecache
from functools import cache
from types import FunctionType, ModuleType

from torch import Tensor, fx, nn

from tersor.graph.stack_traces import frames_in

_DROPOUT = {"dropout", "dropout1d", "dropout2d", "dropout3d"}
_PLACE = 2
"""Place of `training` among the arguments of F.dropout."""


def never_drops(node: fx.Node, module: nn.Module) -> bool:
    """Whether an operator was recorded from a call of dropout with the constant `training=False`.

    Args:
        node: the operator.
        module: the module whose forward method ran.
    """
    frames = frames_in(node.meta.get("stack_trace") or "")
    forward = type(module).forward
    if not frames or not isinstance(forward, FunctionType):
        return False
    file, line, _ = frames[-1]
    linecache.checkcache(file)
    calls = [call for call in _calls("".join(linecache.getlines(file))) if call.lineno == line]
    drops = [call for call in calls if _last_name(call.func) in _DROPOUT]
    others = [call for call in calls if call not in drops]
    return bool(drops) and all(map(_is_off, drops)) and all(_cannot_drop(call.func, module, forward) for call in others)


@cache
def _calls(source: str) -> tuple[ast.Call, ...]:
    try:
        return tuple(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    except (SyntaxError, ValueError):  # no Python file, or one with null bytes
        return ()


def _is_off(call: ast.Call) -> bool:
    given = [*call.args[_PLACE : _PLACE + 1], *(each.value for each in call.keywords if each.arg == "training")]
    return any(isinstance(each, ast.Constant) and each.value is False for each in given)


def _last_name(called: ast.expr) -> str:
    return ast.unparse(called).rpartition(".")[2]


def _cannot_drop(called: ast.expr, module: nn.Module, forward: FunctionType) -> bool:
    """Whether a call is of torch's functions, of a method of a tensor, or of a submodule, which has its own lines."""
    path: list[str] = []
    while isinstance(called, ast.Attribute | ast.Call | ast.Subscript):
        path = [called.attr, *path] if isinstance(called, ast.Attribute) else path
        called = called.func if isinstance(called, ast.Call) else called.value
    if not isinstance(called, ast.Name):
        return False
    if path and called.id == forward.__code__.co_varnames[0]:
        return isinstance(getattr(module, path[0], None), nn.Module | Tensor)
    found = forward.__globals__.get(called.id)
    if isinstance(found, ModuleType):
        return found.__name__.startswith("torch")
    return found is None and (bool(path) or hasattr(builtins, called.id))  # a method of a local variable, or a built-in
