"""tersor: a trained vision network goes in; a smaller, faster one comes out, with the evidence beside it.

Importing it imports no torch: the verbs below are loaded when they are first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tersor.core.errors import InputError

if TYPE_CHECKING:
    from tersor.graph.integers import integer_coverage
    from tersor.run import run
    from tersor.saved import load, save
    from tersor.verbs import compare, distill, export, prune, quantize

__version__ = version("tersor")
__all__ = ["InputError", "compare", "distill", "export", "integer_coverage", "load", "prune", "quantize", "run", "save"]

_VERBS = {
    "run": "tersor.run",
    "integer_coverage": "tersor.graph.integers",
    **dict.fromkeys(("compare", "distill", "export", "prune", "quantize"), "tersor.verbs"),
    **dict.fromkeys(("load", "save"), "tersor.saved"),
}


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'tersor' has no attribute '{name}'")
    verb = globals()[name] = getattr(import_module(_VERBS[name]), name)
    return verb


class _Package(ModuleType):
    """`run.py` and `export/` bear the names of verbs, and an import would put the module in the verb's place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _VERBS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
