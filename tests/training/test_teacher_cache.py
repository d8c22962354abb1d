"""Cached teacher outputs: computed once, with the same training as without a cache."""

from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch

from tersor.checkpoint.store import Checkpoints
from tersor.core.errors import InputError
from tersor.core.progress import NullProgress
from tersor.data.batch import Batch
from tersor.pipeline.setup import prepare
from tersor.pipeline.stages import run_stages, train_teacher
from tersor.recipe import parse
from tersor.training.objective import Objective, Outputs
from tersor.training.teacher_cache import TeacherCache

TEACHER = 'teacher: {name: "toy_networks:resnet8", epochs: 1, training: {batch_size: 32}}'
RECIPE = f"""\
model: {{name: "toy_networks:resnet8"}}
{TEACHER}
data: {{name: digits, limit: 64}}
checkpoint_every: 1
stages:
  - name: distil
    epochs: 3
    batch_size: 32
    cache: CACHE
    methods: [soft_targets, {{attention_transfer: {{layers: ["layer?"]}}}}]
    precision: float32  # in bfloat16 an output depends on the batch size
"""


class Stops(NullProgress):
    """Interrupts the training in its fourth step, in the second epoch."""

    def __init__(self):
        self.steps = 0

    def advance(self, amount=1, **shown):
        self.steps += bool(shown)
        if self.steps == 4:
            raise KeyboardInterrupt


def prepared(cache: str, folder):
    """The experiment with a trained teacher, and its checkpoints."""
    experiment = prepare(
        parse(RECIPE.replace("CACHE", cache), "recipe.yaml"), model=None, data=None, progress=NullProgress()
    )
    checkpoints = Checkpoints(folder)
    experiment = replace(experiment, teacher=train_teacher(experiment, checkpoints, NullProgress()))
    return experiment, checkpoints


def run_recipe(cache: str, folder):
    """Losses of the last epoch, number of images that the teacher ran on during the stage, and the student."""
    experiment, checkpoints = prepared(cache, folder)
    seen: list[int] = []
    teacher_forward = Objective.teacher_forward

    def count(objective, batch):
        seen.append(len(batch.images))
        return teacher_forward(objective, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "teacher_forward", count)
        model, (record,) = run_stages(experiment, checkpoints, NullProgress())
    return record.losses, sum(seen), model.state_dict()


def test_a_cache_does_not_change_the_training(tmp_path):
    uncached_losses, uncached_images, _ = run_recipe("false", tmp_path / "uncached")
    losses, images, whole = run_recipe("true", tmp_path / "cached")
    assert images == uncached_images - 2 * 64, "once, not in each of three epochs"
    assert losses == pytest.approx(uncached_losses, rel=5e-3)  # other batch sizes: sums in another order

    experiment, checkpoints = prepared("true", tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        run_stages(experiment, checkpoints, Stops())
    resumed = run_recipe("true", tmp_path / "stopped")[2]
    assert all(resumed[key].equal(value) for key, value in whole.items())


def test_outputs_are_stored_by_image_and_layer():
    cache = TeacherCache(4)
    logits, layer = torch.randn(4, 10), torch.randn(4, 2, 3, 3)
    for places in (torch.tensor([2, 0]), torch.tensor([1, 3])):
        cache.add(Batch(torch.zeros(2, 3, 8, 8), index=places), Outputs(logits[places], {"layer": layer[places]}))
    index = torch.tensor([3, 2, 2])
    found = cache(Batch(torch.zeros(3, 3, 8, 8), index=index))
    assert found.logits.equal(logits[index])
    assert found.layers["layer"].equal(layer[index])
    assert set(found.layers) == {"layer"}


def test_too_little_memory_raises_before_allocation(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4_000_000, free=10))
    outputs = Outputs(torch.zeros(2, 10), {"layer3": torch.zeros(2, 64, 8, 8)})
    with pytest.raises(InputError, match=r"for 1,000 images \(logits, layer3\).*Write cache: false"):
        TeacherCache(1000).add(Batch(torch.zeros(2, 3, 8, 8), index=torch.arange(2)), outputs)


def test_memory_that_the_system_can_free_counts_as_available(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4_000_000, free=10))
    cache, logits = TeacherCache(1000), torch.randn(2, 10)
    batch = Batch(torch.zeros(2, 3, 8, 8), index=torch.tensor([7, 999]))
    cache.add(batch, Outputs(logits, {}))
    assert cache(batch).logits.equal(logits)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("limit: 64", "limit: 64, augment: flip"), "data.augment is flip"),
        ((TEACHER, "seed: 1"), "there is no teacher"),
    ],
)
def test_a_cache_without_fixed_images_or_teacher_raises(change, why):
    text = RECIPE.replace("CACHE", "true").replace(*change)
    with pytest.raises(InputError, match=rf"line 9.*{why}"):
        parse(text, "recipe.yaml")
