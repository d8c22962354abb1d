"""Public functions can always be called, whatever was imported before: two modules have the names of functions."""

import importlib
import sys

import pytest

import tersor

FIRST = ["tersor.deploy.onnx", "tersor.pipeline.run", "tersor.api", None]


@pytest.fixture
def not_imported():
    """Forget every module of tersor, and restore the same modules at the end."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "tersor"}
    for name in before:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "tersor"]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.usefixtures("not_imported")
def test_public_functions_are_callable_whatever_was_imported_first(first):
    if first:
        importlib.import_module(first)
    imported = importlib.import_module("tersor")
    assert imported is not tersor
    assert all(callable(getattr(imported, verb)) for verb in tersor.__all__[1:])


@pytest.mark.usefixtures("not_imported")
def test_documented_subpackages_can_be_used_without_their_own_import():
    imported = importlib.import_module("tersor")
    assert callable(imported.data.load)
    assert callable(imported.models.build)
    assert callable(imported.methods.get)
    assert "tersor.search" not in sys.modules


def test_an_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'exprot'"):
        tersor.__getattr__("exprot")


@pytest.mark.usefixtures("not_imported")
def test_dir_lists_the_functions_before_they_are_imported():
    listed = dir(importlib.import_module("tersor"))
    assert set(tersor.__all__) <= set(listed)
    assert "import_module" not in listed
