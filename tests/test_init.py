"""A verb stays a verb, whatever was imported before: two modules bear the names of verbs."""

import subprocess
import sys

import pytest

import tersor

FIRST = ["tersor.deploy.onnx", "tersor.pipeline.run", "tersor.api", None]


def test_verbs_are_functions_whatever_was_imported_first():
    code = f"""
import importlib, inspect, sys
for first in {FIRST!r}:
    for name in [name for name in sys.modules if name.split(".")[0] == "tersor"]:
        del sys.modules[name]
    if first:
        importlib.import_module(first)
    import tersor
    assert all(inspect.isfunction(getattr(tersor, verb)) for verb in {tersor.__all__[1:]!r}), first
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'exprot'"):
        tersor.__getattr__("exprot")
