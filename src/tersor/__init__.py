"""tersor: a trained vision network goes in; a smaller, faster one comes out, with the evidence beside it.

Importing it imports no torch: the verbs below are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tersor.core.errors import InputError

if TYPE_CHECKING:
    from tersor.run import run
    from tersor.verbs import compare, distill, export, quantize

__version__ = version("tersor")
__all__ = ["InputError", "compare", "distill", "export", "quantize", "run"]

_VERBS = {"run": "tersor.run", **dict.fromkeys(("compare", "distill", "export", "quantize"), "tersor.verbs")}


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'tersor' has no attribute '{name}'")
    verb = getattr(import_module(_VERBS[name]), name)
    globals()[name] = verb  # `tersor.run` names a module too, which the import has just put here
    return verb
