"""tersor: compress PyTorch vision models. Distill, prune, quantize, export to ONNX, and measure the result.

Importing the package does not import torch; the functions and packages below are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tersor.core.errors import InputError

if TYPE_CHECKING:
    from tersor.api import compare, distill, export, prune, quantize
    from tersor.checkpoint.model_folder import load, save
    from tersor.pipeline.run import run
    from tersor.quantization.integer_coverage import integer_coverage
    from tersor.search.compress import compress
    from tersor.search.compression_budget import Budget

__version__ = version("tersor")
__all__ = [
    "Budget",
    "InputError",
    "compare",
    "compress",
    "distill",
    "export",
    "integer_coverage",
    "load",
    "prune",
    "quantize",
    "run",
    "save",
]

_MODULES = {
    "Budget": "tersor.search.compression_budget",
    "compress": "tersor.search.compress",
    "run": "tersor.pipeline.run",
    "integer_coverage": "tersor.quantization.integer_coverage",
    **dict.fromkeys(("compare", "distill", "export", "prune", "quantize"), "tersor.api"),
    **dict.fromkeys(("load", "save"), "tersor.checkpoint.model_folder"),
}
_PACKAGES = ("data", "methods", "models", "recipe", "tasks", "training")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"tersor.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'tersor' has no attribute '{name}'")
    function = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return function


def __dir__() -> list[str]:  # for completion, and for Python's "Did you mean"
    return sorted([*__all__, *_PACKAGES, "__version__"])
