"""Losses on logits of pixels and positions, compared with the loss of each single position."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor import tasks
from tersor.core.errors import InputError
from tersor.data.batch import Batch
from tersor.methods.dcil import DCIL
from tersor.methods.dist import DIST, CorrelationTerm, correlation_distance
from tersor.methods.dkd import DKD, DecoupledTerm, decoupled
from tersor.methods.soft_targets import SoftTargets, SoftTargetTerm, soft_target_loss
from tersor.tasks.functions import FromFunctions
from tersor.training.class_logits import require_logits
from tersor.training.context import AttachContext
from tersor.training.objective import ForwardContext, Objective, Outputs

SHAPES = [(2, 5), (2, 5, 7), (2, 5, 3, 4)]
"""An image, a CTC head (N, C, T), and pixels."""


class Given(nn.Module):
    """Returns the given outputs for any images."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, _images):
        return self.outputs


def drawn(shape, task="classification", seed=0):
    draw = torch.Generator().manual_seed(seed)
    context = ForwardContext(task=tasks.build(task))
    return tuple(Outputs(torch.randn(shape, generator=draw) * 2, context=context) for _ in range(2))


def each_position(logits):
    """The logits (N, classes) at every position."""
    return logits.reshape(*logits.shape[:2], -1).unbind(2)


@pytest.mark.parametrize("shape", SHAPES)
def test_soft_target_loss_is_averaged_over_positions(shape):
    student, teacher = drawn(shape)
    found = SoftTargetTerm(3.0, 0.5)(Batch(torch.zeros(2)), student, teacher)
    positions = zip(each_position(student.outputs), each_position(teacher.outputs), strict=True)
    expected = torch.stack([soft_target_loss(*both, 3.0) for both in positions]).mean() * 0.5
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_dist_treats_positions_like_images(shape):
    student, teacher = drawn(shape)
    found = CorrelationTerm(DIST(beta=0.5, gamma=2.0, temperature=2.0))(Batch(torch.zeros(2)), student, teacher)
    rows = [torch.cat(each_position(each.outputs)).div(2).softmax(1) for each in (student, teacher)]
    expected = 0.5 * correlation_distance(*rows) + 2 * correlation_distance(*(each.T for each in rows))
    torch.testing.assert_close(found, 4 * expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_dkd_uses_the_class_of_each_position(shape):
    student, teacher = drawn(shape)
    targets = torch.randint(5, (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(3))
    found = DecoupledTerm(DKD(temperature=2.0))(Batch(torch.zeros(2), targets), student, teacher)
    rows = [torch.cat(each_position(each.outputs)) for each in (student, teacher)]
    tckd, nckd = decoupled(*rows, torch.cat(targets.reshape(2, -1).unbind(1)), 2.0)
    torch.testing.assert_close(found, tckd + 8 * nckd)


@pytest.mark.parametrize("own_loss", [None, F.mse_loss])
def test_dkd_ignores_pixels_without_a_class_and_downsamples_larger_masks(own_loss):
    student, teacher = drawn((2, 5, 3, 4))
    task = tasks.build("segmentation", ignore_index=9)
    context = ForwardContext(task=task if own_loss is None else FromFunctions(task, own_loss, None))
    student = Outputs(student.outputs, context=context)
    targets = torch.randint(5, (2, 3, 4), generator=torch.Generator().manual_seed(3))
    targets[0] = 9
    larger = targets.repeat_interleave(2, 1).repeat_interleave(2, 2)
    found = DecoupledTerm(DKD())(Batch(torch.zeros(2), larger), student, teacher)
    only = [Outputs(each.outputs[1:], context=context) for each in (student, teacher)]
    torch.testing.assert_close(found, DecoupledTerm(DKD())(Batch(torch.zeros(1), targets[1:]), *only))


@pytest.mark.parametrize("shape", [(3, 4), (3, 1)])
def test_independent_classes_are_separate_distributions(shape):
    student, teacher = drawn(shape, "multilabel" if shape[1] > 1 else "classification")
    found = SoftTargetTerm(2.0, 1.0)(Batch(torch.zeros(3)), student, teacher)
    p, q = ((each.outputs / 2).sigmoid() for each in (student, teacher))
    divergence = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    torch.testing.assert_close(found, 4 * divergence.mean())


def test_dist_correlates_the_probabilities_of_independent_classes():
    student, teacher = drawn((6, 4), "multilabel")
    found = CorrelationTerm(DIST(gamma=0, temperature=1))(Batch(torch.zeros(6)), student, teacher)
    expected = correlation_distance(student.outputs.sigmoid(), teacher.outputs.sigmoid())
    torch.testing.assert_close(found, expected)


def context_of(task, teacher, targets=None):
    return AttachContext(data=[(torch.zeros(2, 3, 4, 4), targets)], teacher=Given(teacher), task=tasks.build(task))


LOGITS, PIXELS = torch.randn(2, 3), torch.randn(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("method", "task", "outputs", "targets", "message"),
    [
        (SoftTargets(), "regression", LOGITS, None, "soft_targets .* the task regression has none. Write fitnet"),
        (DIST(), "segmentation", (PIXELS, PIXELS), None, r"dist .* has none in the outputs of the student \(a tup"),
        (DKD(), "embedding", LOGITS, None, "dkd .* the task embedding has none. Write fitnet"),
        (DKD(), "multilabel", LOGITS, None, "dkd .* the task multilabel has any number .* Write soft_targets or dist"),
        (DKD(), "segmentation", PIXELS, [1, 2], "dkd needs one class index for each position.* Given targets: a list"),
        (DKD(), "segmentation", PIXELS, torch.rand(2, 4, 4), r"Given targets: shape \(2, 4, 4\)"),
        (SoftTargets(standardize=True), "multilabel", LOGITS, None, "multilabel. Write standardize: false"),
        (DCIL(), "regression", LOGITS, None, "dcil .* the task regression has none. Write mutual: false"),
    ],
)  # fmt: skip
def test_a_method_that_the_task_does_not_support_raises_before_training(method, task, outputs, targets, message):
    network = Given(outputs)
    network.conv = nn.Conv2d(3, 3, 1)
    with pytest.raises(InputError, match=message):
        method.attach(network, context_of(task, outputs, targets))


def test_without_data_only_the_task_is_checked():
    with pytest.raises(InputError, match="the task distance has none"):
        SoftTargets().attach(Given(LOGITS), AttachContext(teacher=Given(LOGITS), task=tasks.build("distance")))
    assert SoftTargets().attach(Given(LOGITS), AttachContext(teacher=Given(LOGITS))).terms


def test_logits_of_different_shapes_raise():
    with pytest.raises(
        InputError, match=r"student have the shape \(2, 3, 4, 4\) and those of the teacher \(2, 3, 8, 8\)"
    ):
        require_logits(
            context_of("segmentation", PIXELS),
            "soft_targets",
            student=Given(PIXELS),
            teacher=Given(torch.zeros(2, 3, 8, 8)),
        )


@pytest.mark.parametrize("method", [SoftTargets(), SoftTargets(standardize=True), DKD(), DIST()])
@pytest.mark.parametrize("classes", [1, 5])
def test_a_teacher_with_other_classes_raises_in_a_users_loop_without_data(method, classes):
    student, teacher = nn.Linear(3, 10), nn.Linear(3, classes)
    attached = method.attach(student, AttachContext(teacher=teacher, steps=1))
    objective = Objective(attached.model, attached.terms, teacher, label_weight=attached.label_weight)
    name = type(method).__module__.rpartition(".")[2]
    expected = (
        f"{name} compares logits of equal shape, but those of the student have the shape (4, 10) and those of the "
        f"teacher (4, {classes}). Use networks with the same classes and the same output size, or fitnet, "
    )
    with pytest.raises(InputError, match=f"^{re.escape(expected)}"):
        objective((torch.randn(4, 3), torch.tensor([3, 1, 4, 1])))


def test_checking_logits_draws_no_random_numbers():
    loader = torch.utils.data.DataLoader(torch.zeros(4, 3, 4, 4), batch_size=2, shuffle=True)
    state = torch.get_rng_state()
    require_logits(AttachContext(data=loader), "soft_targets", network=Given(LOGITS))
    assert torch.equal(torch.get_rng_state(), state)


def test_targets_with_a_shape_other_than_the_positions_raise_in_the_step():
    student, teacher = drawn((2, 5, 7))
    with pytest.raises(InputError, match=r"Given targets: shape \(2, 3\)"):
        DecoupledTerm(DKD())(Batch(torch.zeros(2), torch.zeros(2, 3).long()), student, teacher)


class Values(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return {"values": self.head(self.conv(x).mean((2, 3)))}


@pytest.mark.parametrize("task", ["distance", "regression"])
def test_dcil_trains_its_dense_path_with_the_loss_of_any_task(task):
    torch.manual_seed(0)
    model, teacher, goal = Values(), Values(), tasks.build(task)
    batch = Batch(torch.randn(2, 3, 6, 6), torch.randn(2, 2))
    context = AttachContext(teacher=teacher, task=goal, steps=4)
    attachment = DCIL(mutual=False, sparsity=0.5).attach(model, context)
    losses = Objective(attachment.model, attachment.terms, teacher, task=goal)(batch)
    torch.testing.assert_close(losses["dcil"], losses["labels"])  # nothing is masked before the first step
    with pytest.raises(InputError, match=r"dcil .* the outputs of the original network. Write teacher: original"):
        DCIL(mutual=False).attach(Values(), AttachContext(task=tasks.build("distance"), steps=4))
