"""How networks and images go through a recipe."""

import torch

from tersor.checkpoint import Checkpoints
from tersor.core.watch import Unwatched
from tersor.prepare import prepare
from tersor.recipe import parse

RECIPE = """\
model: {name: resnet20}
teacher: {name: resnet20, epochs: 1, training: {batch_size: 32}}
data: {name: digits, limit: 64, augment: flip}
seed: SEED
stages:
  - {name: distil, steps: 3, batch_size: 32, methods: [soft_targets]}
  - {name: quantize, methods: [{ptq: {calibration_images: 32}}]}
"""


def walked(folder, seed: int, noise: int) -> dict[str, torch.Tensor]:
    """What the recipe ends with in a process that has drawn `noise` numbers before."""
    torch.rand(noise)
    recipe = parse(RECIPE.replace("SEED", str(seed)), "recipe.yaml")
    walk = prepare(recipe, model=None, data=None, watch=Unwatched())
    checkpoints = Checkpoints(folder)
    walk.train_teacher(Unwatched(), checkpoints)
    walk.stages(Unwatched(), checkpoints)
    return walk.model.state_dict()


def test_same_seed_same_bits_and_another_seed_others(tmp_path):
    first = walked(tmp_path / "a", seed=3, noise=1)
    second = walked(tmp_path / "b", seed=3, noise=7)
    other = walked(tmp_path / "c", seed=4, noise=1)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(
        first["linear.parametrizations.weight.original"], other["linear.parametrizations.weight.original"]
    )


def test_a_run_leaves_the_callers_random_numbers_alone(tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    recipe = parse(RECIPE.replace("SEED", "5"), "recipe.yaml")
    prepare(recipe, model=None, data=None, watch=Unwatched())
    assert torch.equal(torch.rand(3), expected)
