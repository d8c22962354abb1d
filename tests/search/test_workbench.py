"""Which images train, choose and test."""

import torch
from torch import nn

from tersor.core.progress import NO_PROGRESS
from tersor.data.image_sets import Pixels, Splits, View
from tersor.data.splitting import joined
from tersor.pipeline.experiment import Experiment
from tersor.recipe import DataSource, Network, Recipe, Stage
from tersor.search.workbench import Workbench
from tersor.tasks.classification import Classification


def images(first, count):
    pixels = torch.arange(first, first + count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 8, 8, 3).contiguous()
    return Pixels(pixels, torch.arange(count, dtype=torch.int64) % 2)


def values(selected):
    return selected.take(torch.arange(len(selected)))[:, 0, 0, 0].tolist()


def bench(data, tmp_path, **source):
    recipe = Recipe(
        model=Network(name="resnet20"), data=DataSource(name="digits", **source), stages=(Stage(name="train", steps=1),)
    )
    network = nn.Linear(1, 2)
    experiment = Experiment(recipe, Classification(), network, network, data, True, True)
    return Workbench(experiment, {}, tmp_path, NO_PROGRESS)


def splits():
    return Splits(images(0, 40), images(40, 10), images(50, 20), ("a", "b"), (0.5,) * 3, (0.25,) * 3)


def test_half_of_the_test_images_choose_and_the_images_that_were_held_out_train(tmp_path):
    changed = bench(splits(), tmp_path).choosing_on_test_images().experiment
    assert values(changed.data.train) == list(range(50))
    assert changed.data.train.targets.tolist() == [*([0, 1] * 20), *([0, 1] * 5)]
    chosen, rest = values(changed.data.validation), values(changed.data.test)
    assert len(chosen) == len(rest) == 10
    assert sorted([*chosen, *rest]) == list(range(50, 70))
    assert (changed.recipe.data.validation, changed.recipe.data.mean) == (0.0, (0.5,) * 3), "for `tersor run`"


def test_limited_training_images_stay_as_they_are(tmp_path):
    changed = bench(splits(), tmp_path, limit=40).choosing_on_test_images().experiment
    assert values(changed.data.train) == list(range(40))
    assert changed.recipe.data.validation == 0.1


def test_images_that_are_not_in_memory_are_not_joined():
    whole = images(0, 10)
    assert joined(whole, View(whole, torch.tensor([7]))) is None
