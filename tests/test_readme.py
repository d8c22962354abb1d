"""What the documents show, runs: Python blocks, recipes, the method of CONTRIBUTING."""

import re
import sys
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tersor.cli import main
from tersor.data.batch import Batch
from tersor.methods import get
from tersor.recipe import Network, parse, read, write
from tersor.training.context import AttachContext
from tersor.training.objective import Objective

ROOT = Path(__file__).parents[1]


def blocks(document, language):
    found = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{document} shows no {language}"
    return found


def network(width):
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)),
    )


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loader = DataLoader(TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(10, (64,))), 32)
    for block in blocks("README.md", "python"):
        names = {"student": network(4), "teacher": network(8), "loader": loader}
        exec(block, names)
    assert (tmp_path / "model.onnx").is_file()


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md"])
def test_the_recipes_of_the_documents_are_recipes(document):
    for block in blocks(document, "yaml"):
        assert parse(block, document).stages


def given(path):
    """A value for each that a shipped recipe leaves to its user."""
    yaml = YAML(typ="safe").load(path)
    missing = [
        (name, key) for name, part in yaml.items() if isinstance(part, dict) for key in part if part[key] == "???"
    ]
    return [f"{name}.{key}=given" for name, key in missing]


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/**/*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_are_recipes(path):
    recipe = read(path, given(path))
    assert parse(write(recipe), "written") == recipe


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/**/*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_name_no_file(path):
    recipe = read(path, given(path))
    networks = [each for each in (recipe.model, recipe.teacher) if isinstance(each, Network)]
    named = {recipe.data.folder, recipe.data.root, *(network.weights for network in networks)} - {None}
    assert {str(file) for file in named} == ({"given"} if given(path) else set())


def test_what_a_shipped_recipe_leaves_to_its_user_is_named_at_once(capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tersor", "run", str(ROOT / "recipes/cifar10-resnet56.yaml")])
    with pytest.raises(SystemExit, match="2"):
        main()
    told = capfd.readouterr().err
    assert "values are missing: model.weights, data.folder." in told
    assert "--set model.weights=... --set data.folder=..." in told


def test_the_method_of_contributing_is_one(tmp_path, monkeypatch):
    (tmp_path / "logit_matching.py").write_text(blocks("CONTRIBUTING.md", "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    student, teacher = network(4), network(8)
    attached = get("logit_matching:LogitMatching")(loss_weight=0.5).attach(student, AttachContext(teacher=teacher))
    objective = Objective(student, attached.terms, teacher, label_weight=attached.label_weight).eval()
    images = torch.randn(5, 3, 8, 8)
    losses = objective(Batch(images, torch.arange(5)))
    expected = 0.5 * ((student(images) - teacher(images)) ** 2).mean()
    assert torch.equal(losses["logit_matching"], expected)
    assert set(losses) == {"labels", "logit_matching"}
    losses["logit_matching"].backward()
    assert student[0].weight.grad.abs().sum() > 0
