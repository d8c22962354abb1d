"""The code in the documents runs: Python blocks, shell blocks, recipes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from torch import nn

import reference
from tersor.cli import main
from tersor.evaluation import latency
from tersor.methods import names
from tersor.recipe import Network, parse, read, write

ROOT = Path(__file__).parents[1]


def blocks(document, language):
    text = (ROOT / document).read_text()
    matches = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert matches, f"{document} has no {language} block"
    return matches


def network(width):
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)),
    )


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="as pasted", marks=pytest.mark.slow),
        pytest.param(
            {"torchvision.models.resnet18(num_classes=10)": "network(8)", "seconds=1": "seconds=0.1"}, id="small"
        ),
    ],
)
def test_python_blocks_in_the_readme_run(changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latency, "_MIN_GROUPS", 2)  # fewer rounds than by default
    (block,) = blocks("README.md", "python")
    for text, smaller in changes.items():
        assert text in block
        block = block.replace(text, smaller)
    exec(block, {"network": network})
    assert (tmp_path / "model.onnx").is_file()


@pytest.mark.slow
def test_the_recipe_in_the_readme_runs_unchanged(tmp_path):
    block = blocks("README.md", "sh")[-1]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", block], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "runs" / "int8" / "model.onnx").is_file()


def test_the_recipe_in_the_readme_is_valid():
    (text,) = re.findall(r"<<'END'\n(.*?)^END", blocks("README.md", "sh")[-1], re.MULTILINE | re.DOTALL)
    assert parse(text, "README.md").stages


def test_the_readme_lists_every_method():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(names())


def test_the_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


GENERATED = {ROOT.resolve() / "docs" / page for page in reference.generated()}
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_links_point_to_existing_files(document):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not [target for target in missing if (document.parent / target).resolve() not in GENERATED]


def test_the_index_lists_every_decision():
    folder = ROOT / "docs" / "decisions"
    records = sorted(folder.glob("[0-9]*.md"))
    assert re.findall(r"\]\((\d{4}-[^)]+)\)", (folder / "README.md").read_text()) == [path.name for path in records]
    for number, path in enumerate(records, 1):
        assert path.name.startswith(f"{number:04}-")
        assert re.match(rf"# {number}\. .+\n\nDate: \d{{4}}-\d\d-\d\d\n\n## Context\n", path.read_text())
        assert re.findall(r"^## (\w+)", path.read_text(), re.MULTILINE) == ["Context", "Decision", "Consequence"]


def overrides(path):
    """Return an override for every value that the user has to set in an included recipe."""
    yaml = YAML(typ="safe").load(path)
    missing = [
        (name, key) for name, part in yaml.items() if isinstance(part, dict) for key in part if part[key] == "???"
    ]
    return [f"{name}.{key}=given" for name, key in missing]


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/**/*.yaml")), ids=lambda path: path.stem)
def test_an_included_recipe_is_valid(path):
    recipe = read(path, overrides(path))
    assert parse(write(recipe), "written") == recipe


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/**/*.yaml")), ids=lambda path: path.stem)
def test_an_included_recipe_contains_no_local_paths(path):
    recipe = read(path, overrides(path))
    networks = [each for each in (recipe.model, recipe.teacher) if isinstance(each, Network)]
    named = {recipe.data.folder, recipe.data.root, *(network.weights for network in networks)} - {None}
    assert {str(file) for file in named} == ({"given"} if overrides(path) else set())


def test_all_missing_values_of_a_recipe_are_reported_together(capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tersor", "run", str(ROOT / "recipes/cifar10-resnet56.yaml")])
    with pytest.raises(SystemExit, match="2"):
        main()
    message = capfd.readouterr().err
    assert "values are missing: model.weights, data.folder." in message
    assert "--set model.weights=... --set data.folder=..." in message
