"""Invalid targets, losses and metrics raise one error and do not give a wrong number."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.classification import BinaryAccuracy

from tersor import tasks
from tersor.core.errors import InputError
from tersor.data.batch import Batch
from tersor.evaluation.scoring import score
from tersor.pipeline.task_arguments import targets_for, task_of, task_of_both
from tersor.tasks.functions import FromFunctions
from tersor.tasks.task import Task, loss_of
from tersor.training.objective import LossTerm, Objective

LOGITS = torch.zeros(2, 3, 4, 4)
MASKS = torch.ones(2, 4, 4, dtype=torch.int64)
MASKS_THAT_DO_NOT_FIT = [
    (MASKS * 3, r"class indices from 3 to 3\. Possible: 0 to 2"),
    (MASKS * -1, "class indices from -1 to -1"),
    (MASKS + 0.5, r"not class indices, from 1\.5"),
    (MASKS[:, 0, 0], r"the targets have the shape \(2,\)"),
]


@pytest.mark.parametrize(("masks", "message"), MASKS_THAT_DO_NOT_FIT)
def test_invalid_masks_raise_in_training_and_in_measurements(masks, message):
    task = tasks.build("segmentation")
    with pytest.raises(InputError, match=message):
        task.loss(LOGITS, masks)
    with pytest.raises(InputError, match=message):
        targets_for(task, [(torch.zeros(2, 3, 4, 4), masks)], LOGITS)


@pytest.mark.parametrize(("masks", "message"), MASKS_THAT_DO_NOT_FIT[1:])
def test_invalid_masks_raise_when_scored(masks, message):
    with pytest.raises(InputError, match=message):
        score(tasks.build("segmentation"), MASKS, masks)


def test_masks_with_integer_valued_floats_and_ignored_pixels_are_valid():
    task = tasks.build("segmentation")
    masks = MASKS.float()
    masks[0] = 255
    assert task.loss(LOGITS, masks).item() == pytest.approx(math.log(3))
    assert score(task, MASKS, masks) == 100


@pytest.mark.parametrize("value", [-1, 2, 0.5])
def test_multilabel_targets_other_than_0_and_1_raise(value):
    task = tasks.build("multilabel")
    targets = torch.full((2, 3), value)
    with pytest.raises(InputError, match="Pass 0 or 1"):
        task.loss(torch.zeros(2, 3), targets)
    with pytest.raises(InputError, match="Pass 0 or 1"):
        score(task, torch.ones(2, 3, dtype=torch.bool), targets)


def test_a_metric_that_is_nan_raises():
    with pytest.raises(InputError, match="mean absolute error is nan"):
        score(tasks.build("regression"), torch.zeros(2, 1), torch.full((2,), math.nan))
    with pytest.raises(InputError, match="mIoU is nan"):
        score(tasks.build("segmentation"), MASKS * 0, MASKS * 255)


@pytest.mark.parametrize("value", [torch.zeros(2), "good", None])
def test_a_users_metric_that_does_not_return_one_number_raises(value):
    def error(outputs, targets):
        return value

    with pytest.raises(InputError, match=r"the metric error returned .* Return one number"):
        score(FromFunctions(tasks.build("regression"), None, error), torch.zeros(2, 1), torch.zeros(2))


def test_a_users_metric_is_weighted_by_the_number_of_images_for_targets_in_a_dict():
    task = FromFunctions(tasks.build("regression"), None, lambda outputs, _: outputs.mean())
    pairs = [(torch.full((count,), value), {"values": torch.zeros(count)}) for count, value in ((3, 1.0), (1, 5.0))]
    assert task.score(pairs) == 2


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda outputs, _: outputs.detach().mean(), "the loss has no gradient"),
        (lambda outputs, _: outputs.abs(), r"the loss returned shape \(2,\)"),
        (lambda *_: None, "the loss returned a NoneType"),
    ],
)
def test_a_loss_that_cannot_be_trained_with_raises(loss, message):
    task = FromFunctions(tasks.build("regression"), loss, None)
    with pytest.raises(InputError, match=message):
        loss_of(task, torch.zeros(2, requires_grad=True), torch.zeros(2))


def test_student_and_teacher_with_different_numbers_of_classes_raise():
    student, teacher = (torch.nn.Conv2d(3, classes, 1) for classes in (2, 3))
    with pytest.raises(InputError, match="student returns logits of 2 classes, the teacher of 3"):
        task_of_both(tasks.build("segmentation"), student, teacher, torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"metric": "x", "loss": abs}, "the task Own has no score"),
        ({"metric": "x", "score": abs}, "the task Own has no loss"),
        ({"score": abs}, "has no loss and no metric"),
    ],
)
def test_an_incomplete_task_of_a_user_raises(members, message):
    with pytest.raises(InputError, match=message):
        tasks.build(type("Own", (Task,), members)())


def test_a_score_can_be_a_tensor():
    members = {"metric": "x", "loss": abs, "score": lambda *_: torch.tensor(3.0)}
    assert score(tasks.build(type("Own", (Task,), members)()), MASKS, MASKS) == 3


def boxed(boxes, labels=(1,)):
    return [{"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)}]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (boxed([[20.0, 20.0, 5.0, 5.0]]), "the box 20, 20, 5, 5"),
        (boxed([[math.nan, 2.0, 9.0, 9.0]]), "the box nan"),
        (boxed([[2.0, 2.0, 9.0, 9.0]], (0,)), "label 0"),
        (boxed([[2.0, 2.0, 9.0, 9.0]], (1, 2)), r"shape \(1, 4\) and labels \(2,\)"),
        ([{"box": torch.zeros(1, 4)}], "not a list of 1 dicts"),
        (boxed([[2.0, 2.0, 9.0, 9.0]]) * 2, "not a list of 1 dicts .* for each image"),
    ],
)
def test_boxes_with_a_wrong_form_raise(targets, message):
    found = [{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}]
    with pytest.raises(InputError, match=message):
        score(tasks.build("detection"), found, targets)


def test_targets_that_are_not_tensors_raise():
    with pytest.raises(InputError, match="the targets are of type list"):
        tasks.build("regression").loss(torch.zeros(2, 1), ["a", "b"])


def test_a_loss_term_that_is_not_a_scalar_raises():
    class Vector(LossTerm):
        name = "vector"

        def forward(self, batch, student, teacher):
            return student.outputs.mean(1)

    objective = Objective(torch.nn.Linear(3, 2), terms=[Vector()], task=tasks.build("regression"))
    with pytest.raises(InputError, match=r"the loss vector returned shape \(4,\)"):
        objective(Batch(torch.zeros(4, 3), None))


def test_a_class_instead_of_a_metric_instance_raises():
    with pytest.raises(InputError, match=r"metric is the class BinaryAccuracy.*an instance"):
        task_of("multilabel", metric=BinaryAccuracy)


def test_an_error_in_a_torchmetrics_metric_is_reported():
    with pytest.raises(InputError, match=r"the metric BinaryAccuracy failed in .*torchmetrics.*same shape"):
        score(FromFunctions(tasks.build("multilabel"), None, BinaryAccuracy()), torch.zeros(2, 3), torch.zeros(2, 4))
