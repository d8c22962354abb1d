"""Batches, steps, original and teacher of an experiment, and the tasks of the first process."""

import dataclasses

import pytest
import torch
from torch import nn

from recorded_progress import RecordedProgress
from tersor import tasks
from tersor.checkpoint.store import Checkpoints
from tersor.data.image_sets import Pixels, Splits
from tersor.pipeline import stage_validation, stages
from tersor.pipeline.experiment import Experiment
from tersor.recipe import DataSource, Network, Recipe, Stage
from tersor.training.attachment import Attachment
from tersor.training.objective import LossTerm


def images(count):
    return Pixels(
        torch.arange(count * 192, dtype=torch.int64).remainder(256).byte().view(count, 8, 8, 3), torch.arange(count) % 2
    )


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).eval()


def experiment(task="classification", *, teacher=None, trained=True, **recipe):
    given = {
        "model": Network(name="resnet20"), "data": DataSource(name="digits", augment="flip"), "seed": 3,
        "stages": (Stage(name="a", epochs=2, batch_size=8), Stage(name="b", steps=5)),
    }  # fmt: skip
    data = Splits(images(40), images(10), images(20), ("a", "b"), (0.5,) * 3, (0.25,) * 3)
    return Experiment(Recipe(**(given | recipe)), tasks.build(task), network(), teacher, data, trained, False)


def test_the_original_is_the_model_or_the_teacher_of_an_untrained_model():
    teacher = network()
    for trained, given, which in (
        (True, teacher, "model"),
        (True, None, "model"),
        (False, None, "model"),
        (False, teacher, "teacher"),
    ):
        made = experiment(teacher=given, trained=trained)
        assert made.original is getattr(made, which)


def test_steps_and_training_batches_of_a_stage_follow_the_recipe():
    made = experiment()
    first, second = made.recipe.stages
    assert (made.steps_of(first), made.steps_of(second)) == (10, 5)
    batches = made.training_batches(first)
    assert (len(batches), batches.batch_size) == (5, 8)
    orders = [
        [index for batch in each for index in batch.index.tolist()] for each in (batches, made.training_batches(first))
    ]
    assert orders[0] == orders[1] != sorted(orders[0]), "shuffled by the seed"
    plain = next(iter(made.batches(made.data.train, 4)))
    assert plain.index.tolist() == [0, 1, 2, 3]
    assert plain.images[0, 0, 0, 0] == pytest.approx((0 / 255 - 0.5) / 0.25)
    augmented = next(iter(batches))
    kept = made.batches(made.data.train, 8).take(augmented.index).images
    assert not torch.equal(augmented.images, kept)
    assert ((augmented.images == kept) | (augmented.images == kept.flip(3))).flatten(1).all(1).all()


def test_a_stage_starts_trained_if_weights_are_loaded_or_an_earlier_stage_trains():
    for trained, stages_, expected in (
        (True, (Stage(name="a"), Stage(name="b")), [True, True]),
        (False, (Stage(name="a"), Stage(name="b"), Stage(name="c")), [False, False, False]),
        (False, (Stage(name="a"), Stage(name="b", steps=1), Stage(name="c")), [False, False, True]),
    ):
        made = experiment(trained=trained, stages=stages_)
        assert [made.starts_trained(stage) for stage in stages_] == expected


class Term(LossTerm):
    name = "term"


def test_in_a_task_that_compares_with_the_original_the_original_is_the_teacher():
    made = experiment("distance")
    stage = made.recipe.stages[0]
    batch = next(iter(made.batches(made.data.train, 4))).images
    teacher = stages._fast_teacher(made, stage, Attachment(made.model))
    assert teacher is not made.model
    torch.testing.assert_close(teacher(batch), made.model(batch))
    assert not any(isinstance(each, nn.BatchNorm2d) for each in teacher.modules()), "its layers are fused"
    classifies = experiment()
    assert stages._fast_teacher(classifies, stage, Attachment(classifies.model, [Term()])) is None
    taught = experiment(teacher=network())
    assert stages._fast_teacher(taught, stage, Attachment(taught.model)) is taught.teacher, "no loss needs its outputs"
    assert stages._fast_teacher(taught, stage, Attachment(taught.model, [Term()])) is not taught.teacher


def test_the_metric_is_computed_on_the_validation_images(monkeypatch):
    made, progress = experiment(), RecordedProgress()
    score = stage_validation.validate(made, made.model, "a", progress)
    batch = next(iter(made.batches(made.data.validation, 10)))
    assert score == pytest.approx(100 * (made.model(batch.images).argmax(1) == batch.targets).double().mean())
    none = dataclasses.replace(made, data=dataclasses.replace(made.data, validation=images(0)))
    assert stage_validation.validate(none, made.model, "a", progress) is None
    assert progress.lines == [
        f"a: accuracy {score:.2f} % on 10 validation images",
        "a: done (the data has no validation images)",
    ]
    monkeypatch.setattr(stage_validation.distributed, "rank", lambda: 1)
    assert stage_validation.validate(made, made.model, "a", progress) is None


def test_the_validation_curve_is_measured_every_given_number_of_epochs():
    made = experiment()
    every = Stage(name="a", epochs=6, batch_size=8, validate_every=3)
    assert stage_validation.validation_curve(made, made.recipe.stages[0]) is None
    curve = stage_validation.validation_curve(made, every)
    assert curve.every == 15
    for done in (14, 15, 16):
        curve.measure_if_due(done, made.model, None)
    assert curve.values == [stage_validation.validate(made, made.model, "a", RecordedProgress())]


def test_the_first_process_saves_the_end_of_a_stage(tmp_path, monkeypatch):
    checkpoints, made = Checkpoints(tmp_path / "c"), network()
    stages._save_end(checkpoints, 2, "b", 7, made, {"stages": [{"name": "b"}]}, {"extra": torch.ones(1)})
    end = checkpoints.end_of(2)
    assert (end.step, end.done, end.stages) == (7, True, [{"name": "b"}])
    assert end.network().keys() == made.state_dict().keys()
    assert end.tensors()["kept.extra"].tolist() == [1]
    assert end.structure()["freezable"] == []
    fresh = network()
    nn.init.zeros_(fresh[0].weight)
    assert torch.equal(stages._restored(fresh, end)[0].weight, made[0].weight)
    monkeypatch.setattr(stages.distributed, "rank", lambda: 1)
    stages._save_end(checkpoints, 3, "c", 7, made, {}, {})
    assert checkpoints.end_of(3) is None
