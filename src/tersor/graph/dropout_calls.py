"""Calls of F.dropout with `training=False` in the source code, which never drop.

torch.export runs a network in eval mode, so the operator of such a call equals that of
`F.dropout(x, p, self.training)`. Only the source code tells them apart.
"""

from __future__ import annotations

import ast
import linecache
from functools import cache

from torch import fx

from tersor.graph.stack_traces import frames_in

_PLACE = 2
"""Place of `training` among the arguments of F.dropout."""


def never_drops(node: fx.Node) -> bool:
    """Whether the call that an operator was recorded from has the constant `training=False`."""
    frames = frames_in(node.meta.get("stack_trace") or "")
    if not frames:
        return False
    file, line, _ = frames[-1]
    return line in _lines(file)


@cache
def _lines(file: str) -> frozenset[int]:
    """The lines of a file at which calls of dropout with the constant `training=False` begin."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return frozenset()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and "dropout" in ast.unparse(node.func)]
    return frozenset(call.lineno for call in calls if any(map(_is_false, _training(call))))


def _training(call: ast.Call) -> list[ast.expr]:
    return [*call.args[_PLACE : _PLACE + 1], *(each.value for each in call.keywords if each.arg == "training")]


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False
