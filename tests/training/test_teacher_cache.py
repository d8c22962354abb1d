"""What a teacher gives is asked once, and is the same as if it were asked every time."""

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

RECIPE = """\
model: {name: resnet20}
teacher: {name: resnet20, epochs: 1, training: {batch_size: 32}}
data: {name: digits, limit: 64}
checkpoint_every: 1
stages:
  - name: distil
    epochs: 3
    batch_size: 32
    cache: CACHE
    methods: [soft_targets, {attention_transfer: {layers: ["layer?"]}}]
    precision: float32  # in bfloat16 an answer depends on how many images are asked about at once
"""


class Stops(NullProgress):
    """Ends the training in its fourth step, in the second epoch."""

    def __init__(self):
        self.steps = 0

    def advance(self, amount=1, **shown):
        self.steps += bool(shown)
        if self.steps == 4:
            raise KeyboardInterrupt


def prepared(cache: str, folder):
    """The recipe with its teacher trained, and where its checkpoints lie."""
    experiment = prepare(
        parse(RECIPE.replace("CACHE", cache), "recipe.yaml"), model=None, data=None, progress=NullProgress()
    )
    checkpoints = Checkpoints(folder)
    experiment = replace(experiment, teacher=train_teacher(experiment, checkpoints, NullProgress()))
    return experiment, checkpoints


def run_recipe(cache: str, folder):
    """Losses of the last epoch, how many images the teacher has seen while the student learned, and the student."""
    experiment, checkpoints = prepared(cache, folder)
    seen: list[int] = []
    ask = Objective.teacher_forward

    def count(objective, batch):
        seen.append(len(batch.images))
        return ask(objective, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "teacher_forward", count)
        model, (record,) = run_stages(experiment, checkpoints, NullProgress())
    return record.training["losses"], sum(seen), model.state_dict()


def test_a_student_learns_the_same_from_what_was_kept(tmp_path):
    asked, often, _ = run_recipe("false", tmp_path / "asked")
    kept, once, whole = run_recipe("true", tmp_path / "kept")
    assert once == often - 2 * 64, "once, not in each of three epochs"
    assert kept == pytest.approx(asked, rel=5e-3)  # other batch sizes, added in another order

    experiment, checkpoints = prepared("true", tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        run_stages(experiment, checkpoints, Stops())
    resumed = run_recipe("true", tmp_path / "stopped")[2]
    assert all(resumed[key].equal(value) for key, value in whole.items())


def test_places_and_layers_are_kept_apart():
    kept = TeacherCache(4)
    logits, layer = torch.randn(4, 10), torch.randn(4, 2, 3, 3)
    for places in (torch.tensor([2, 0]), torch.tensor([1, 3])):
        kept.add(Batch(torch.zeros(2, 3, 8, 8), index=places), Outputs(logits[places], {"layer": layer[places]}))
    wanted = torch.tensor([3, 2, 2])
    found = kept(Batch(torch.zeros(3, 3, 8, 8), index=wanted))
    assert found.logits.equal(logits[wanted])
    assert found.layers["layer"].equal(layer[wanted])
    assert set(found.layers) == {"layer"}


def test_too_little_memory_is_told_before_any_is_filled(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4_000_000, free=10))
    given = Outputs(torch.zeros(2, 10), {"layer3": torch.zeros(2, 64, 8, 8)})
    with pytest.raises(InputError, match=r"for 1,000 images \(logits, layer3\).*Write cache: false"):
        TeacherCache(1000).add(Batch(torch.zeros(2, 3, 8, 8), index=torch.arange(2)), given)


def test_memory_that_the_system_can_free_up_counts(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4_000_000, free=10))
    kept, logits = TeacherCache(1000), torch.randn(2, 10)
    batch = Batch(torch.zeros(2, 3, 8, 8), index=torch.tensor([7, 999]))
    kept.add(batch, Outputs(logits, {}))
    assert kept(batch).logits.equal(logits)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("limit: 64", "limit: 64, augment: flip"), "data.augment is flip"),
        (("teacher: {name: resnet20, epochs: 1, training: {batch_size: 32}}", "seed: 1"), "there is no teacher"),
    ],
)
def test_a_cache_that_cannot_be(change, why):
    text = RECIPE.replace("CACHE", "true").replace(*change)
    with pytest.raises(InputError, match=rf"line 9.*{why}"):
        parse(text, "recipe.yaml")
