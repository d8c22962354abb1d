"""What the documents show, runs: Python blocks, recipes, the method of CONTRIBUTING."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tersor.core.objective import Batch, Objective
from tersor.methods import get
from tersor.recipe import parse, read, write

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


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_are_recipes(path):
    recipe = read(path)
    assert parse(write(recipe), "written") == recipe


def test_the_method_of_contributing_is_one(tmp_path, monkeypatch):
    (tmp_path / "logit_matching.py").write_text(blocks("CONTRIBUTING.md", "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    student, teacher = network(4), network(8)
    attached = get("logit_matching:LogitMatching")(loss_weight=0.5).attach(student, teacher=teacher)
    objective = Objective(student, attached.terms, teacher, label_weight=attached.label_weight).eval()
    images = torch.randn(5, 3, 8, 8)
    losses = objective(Batch(images, torch.arange(5)))
    expected = 0.5 * ((student(images) - teacher(images)) ** 2).mean()
    assert torch.equal(losses["logit_matching"], expected)
    assert set(losses) == {"labels", "logit_matching"}
    losses["logit_matching"].backward()
    assert student[0].weight.grad.abs().sum() > 0
