"""The house keeps its shape: floors, sizes, names, and what it may import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "tersor"
FILES = sorted(SOURCE.rglob("*.py"))
FLOORS = {
    "core": 0,
    **dict.fromkeys(("data", "zoo", "graph", "train", "measure"), 1),
    "methods": 2,
    "export": 3,
    "cli": 5,
    "__main__": 6,
}
TOP = 4
"""Of every other file at the root: recipe, run, and what serves them."""


def name_of(file):
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module):
    """`core` of `tersor.core.affine`; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def floor(module):
    return FLOORS.get(room(module), TOP)


def imports(tree):
    """Every module or name that is imported, at the top or inside a function, by its full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import that begins with a dot hides its floor"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def misplaced(importer, imported):
    """Whether `importer` may not know `imported`."""
    if importer == "tersor":  # the front door opens any room, but only when it is knocked at
        return False
    below = floor(imported) < floor(importer)
    same_room = room(imported) == room(importer)
    return not (below or same_room or floor(importer) == floor(imported) == TOP)


@pytest.mark.parametrize(
    ("importer", "imported", "wrong"),
    [
        ("tersor.core.affine", "tersor.core.errors", False),
        ("tersor.core.affine", "tersor.graph.capture", True),
        ("tersor.graph.capture", "tersor.core.errors", False),
        ("tersor.graph.capture", "tersor.zoo.build", True),
        ("tersor.methods.ptq", "tersor.train.fit", False),
        ("tersor.methods.ptq", "tersor.export.onnx", True),
        ("tersor.run", "tersor.recipe.Recipe", False),
        ("tersor.recipe", "tersor.cli.main", True),
        ("tersor.cli", "tersor.run.run", False),
    ],
)
def test_what_misplaced_means(importer, imported, wrong):
    assert misplaced(importer, imported) is wrong


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_down(file):
    importer = name_of(file)
    ours = [name for name in imports(ast.parse(file.read_text())) if name.split(".")[0] == "tersor"]
    assert not [name for name in ours if name != "tersor" and misplaced(importer, name)]


@pytest.mark.parametrize("file", sorted((SOURCE / "methods").glob("[!_]*.py")), ids=name_of)
def test_a_method_knows_no_other_method(file):
    own = name_of(file)
    found = [name for name in imports(ast.parse(file.read_text())) if name.startswith("tersor.methods.")]
    assert not [name for name in found if not name.startswith(f"{own}.")]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_quantization_and_pruning_are_our_own(file):
    """The peers that we are measured against are for `bench/`."""
    text = file.read_text()
    names = list(imports(ast.parse(text)))
    peers = ["nncf", "onnxruntime.quantization", "neural_compressor", "torchao", "torch_pruning"]
    assert not [name for name in names if any(name == peer or name.startswith(f"{peer}.") for peer in peers)]
    assert "onnxruntime.quantization" not in text
    assert "quantize_static" not in text


@pytest.mark.parametrize(
    "module",
    [
        *("tersor", "tersor.cli", "tersor.recipe", "tersor.methods"),
        *("tersor.core.errors", "tersor.core.training", "tersor.core.watch", "tersor.core.target"),
    ],
)
def test_no_torch_is_imported_by(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_long_file_says_why(file):
    lines = file.read_text().splitlines()
    assert len(lines) <= 300 or "lines" in lines[0], f"{len(lines)} lines"


def test_names_say_what_lies_there():
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "base", "tools", "lib"}
    assert not [file for file in FILES if vague & {*file.relative_to(SOURCE).parts, file.stem}]


def test_types_are_shipped():
    assert (SOURCE / "py.typed").is_file()
