"""A verb stays a verb, whatever was imported before: two modules bear the names of verbs."""

import subprocess
import sys

import pytest

import tersor


@pytest.mark.parametrize(
    "first", ["import tersor.export.onnx", "import tersor.run", "import tersor; tersor.distill", ""]
)
def test_verbs_are_functions_in_a_fresh_process(first):
    verbs = tersor.__all__[1:]
    code = f"{first}\nimport tersor, inspect\nassert all(inspect.isfunction(getattr(tersor, v)) for v in {verbs})"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_tersor_imports_no_torch():
    subprocess.run([sys.executable, "-c", "import tersor, sys; sys.exit('torch' in sys.modules)"], check=True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'exprot'"):
        tersor.__getattr__("exprot")
