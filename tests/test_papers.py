"""Recipes with the full protocols of papers: `--explain` works, and two training steps run on synthetic images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from tersor.checkpoint.store import Checkpoints
from tersor.cli import app
from tersor.core.progress import NullProgress
from tersor.data.image_sets import View
from tersor.pipeline.setup import prepare
from tersor.pipeline.stages import Experiment, run_stages, train_teacher
from tersor.recipe import read

RECIPES = Path(__file__).parents[1] / "recipes" / "papers"
OVERRIDES = ["data.root=anywhere"]


def stand_in(classes: int) -> type:
    """Return a stand-in for torchvision's CIFAR data sets, with 1,280 training images."""

    class StandIn:
        def __init__(self, root: str, train: bool) -> None:
            count = 1280 if train else 2 * classes
            self.classes = [f"class {label}" for label in range(classes)]
            self.targets = [place % classes for place in range(count)]
            self.pixels = np.random.default_rng(train).integers(0, 256, (100, 32, 32, 3), np.uint8)

        def __len__(self) -> int:
            return len(self.targets)

        def __getitem__(self, place: int) -> tuple[Image.Image, int]:
            return Image.fromarray(self.pixels[place % 100]), self.targets[place]

    return StandIn


@pytest.fixture(autouse=True)
def cifar(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", stand_in(10))
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", stand_in(100))


def brief(path: Path) -> Experiment:
    """Set up the recipe with two small training steps per stage."""
    recipe = read(path, OVERRIDES)
    assert recipe.teacher is not None
    small = {"batch_size": 4}
    stages = tuple(stage.model_copy(update={"epochs": 0, "steps": 2, **small}) for stage in recipe.stages)
    training = recipe.teacher.training.model_copy(update=small)
    teacher = recipe.teacher.model_copy(update={"epochs": 1, "training": training})
    given = recipe.model_copy(update={"stages": stages, "teacher": teacher})
    experiment = prepare(given, model=None, data=None, progress=NullProgress())
    few = View(experiment.data.train, torch.arange(8))
    experiment = replace(experiment, data=replace(experiment.data, train=few))
    assert experiment.teacher is not None
    for module in experiment.teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # otherwise its statistics after two steps make 27 blocks overflow
    return experiment


QUICK = "at-wrn-16-2-to-16-1"
"""Like the other recipes, it has a teacher without weights, a distillation stage and two networks."""


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem == QUICK else pytest.mark.slow)
        for path in sorted(RECIPES.glob("*.yaml"))
    ],
)
def test_explain_works_and_two_steps_run(path, tmp_path):
    explained = CliRunner().invoke(app, ["run", str(path), "--explain", "--set", *OVERRIDES])
    assert explained.exit_code == 0, explained.output
    steps = {"at": "2,000", "dkd": "4,800", "ft": "1,640"}[path.stem.partition("-")[0]]
    assert explained.output.count(f"{steps} steps") == 2, explained.output
    by_layers = not path.stem.startswith("dkd")
    assert (" (teacher)." in " ".join(explained.output.split())) == by_layers, "notes name the layers"

    experiment, checkpoints = brief(path), Checkpoints(tmp_path)
    before = {name: value.clone() for name, value in experiment.model.state_dict().items()}
    experiment = replace(experiment, teacher=train_teacher(experiment, checkpoints, NullProgress()))
    model, (record,) = run_stages(experiment, checkpoints, NullProgress())
    assert record.steps == 2
    assert all(np.isfinite(value) for value in record.losses.values())
    assert len(record.losses) == 2, "the labels' loss and the method's"
    assert not any(value.equal(before[name]) for name, value in model.named_parameters())
