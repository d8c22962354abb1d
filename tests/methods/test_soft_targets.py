from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tersor.core.errors import InputError
from tersor.data.batch import Batch
from tersor.methods.soft_targets import SoftTargets, SoftTargetTerm, soft_target_loss
from tersor.training.context import AttachContext
from tersor.training.objective import Objective, Outputs

logits = st.integers(1, 4).flatmap(
    lambda rows: st.integers(2, 6).flatmap(
        lambda classes: st.tuples(
            *[
                st.lists(
                    st.lists(st.floats(-30, 30, width=32), min_size=classes, max_size=classes),
                    min_size=rows,
                    max_size=rows,
                )
            ]
            * 2
        )
    )
)
temperatures = st.floats(0.5, 20)


def softened(row, temperature):
    top = max(row)
    powers = [math.exp((value - top) / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def slow_loss(student, teacher, temperature):
    """Hinton's formula, image by image and class by class, in float64."""
    total = 0.0
    for teacher_row, student_row in zip(teacher, student, strict=True):
        for p, q in zip(softened(teacher_row, temperature), softened(student_row, temperature), strict=True):
            total += p * (math.log(p) - math.log(q)) if p > 0 else 0.0
    return temperature**2 * total / len(teacher)


def entropy(row):
    return -sum(p * math.log(p) for p in row if p > 0)


@given(logits, temperatures)
def test_the_loss_equals_a_slow_implementation(pair, temperature):
    student, teacher = pair
    found = soft_target_loss(*(torch.tensor(values, dtype=torch.float64) for values in pair), temperature)
    assert found.item() == pytest.approx(slow_loss(student, teacher, temperature), rel=1e-5, abs=1e-10)


@given(logits, temperatures)
def test_the_gradient_is_t_times_the_difference_of_the_softened_probabilities(pair, temperature):
    student, teacher = (torch.tensor(values, dtype=torch.float64) for values in pair)
    student.requires_grad_()
    soft_target_loss(student, teacher, temperature).backward()
    difference = torch.softmax(student / temperature, 1) - torch.softmax(teacher / temperature, 1)
    torch.testing.assert_close(student.grad, temperature * difference / len(student))


@given(logits, temperatures)
def test_the_loss_is_zero_for_equal_logits_and_never_negative(pair, temperature):
    student, teacher = (torch.tensor(values, dtype=torch.float64) for values in pair)
    assert soft_target_loss(teacher, teacher, temperature) == pytest.approx(0, abs=1e-9)
    assert soft_target_loss(teacher + 3, teacher, temperature) == pytest.approx(0, abs=1e-9)
    assert soft_target_loss(student, teacher, temperature) >= -1e-9


def test_kl_is_averaged_over_images_and_summed_over_classes():
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    each = [soft_target_loss(student[[i]], teacher[[i]], 2.0) for i in range(3)]
    torch.testing.assert_close(soft_target_loss(student, teacher, 2.0), torch.stack(each).mean())


def test_the_loss_is_not_symmetric_in_teacher_and_student():
    sharp, flat = torch.tensor([[4.0, 0.0, 0.0]]), torch.zeros(1, 3)
    forward, backward = (soft_target_loss(*pair, 1.0).item() for pair in ((sharp, flat), (flat, sharp)))
    assert forward == pytest.approx(slow_loss(sharp.tolist(), flat.tolist(), 1.0), rel=1e-5)
    assert abs(forward - backward) > 0.1


def targets_of_the_loss(row, temperature):
    """The target probabilities of the loss, from its gradient at a student with zero logits."""
    student = torch.zeros(1, len(row), dtype=torch.float64, requires_grad=True)
    soft_target_loss(student, torch.tensor([row], dtype=torch.float64), temperature).backward()
    return (1 / len(row) - student.grad[0] / temperature).tolist()


@given(
    st.lists(st.floats(-30, 30), min_size=2, max_size=6), st.lists(temperatures, min_size=2, max_size=2, unique=True)
)
def test_softened_probabilities_keep_their_order_and_flatten_with_the_temperature(row, pair):
    low, high = sorted(pair)
    for temperature in pair:
        shown = targets_of_the_loss(row, temperature)
        assert shown == pytest.approx(softened(row, temperature), abs=1e-9)
        assert sum(shown) == pytest.approx(1)
        by_logit = [p for _, p in sorted(zip(row, shown, strict=True))]
        assert all(before <= after + 1e-12 for before, after in pairwise(by_logit))
    assert entropy(targets_of_the_loss(row, low)) <= entropy(targets_of_the_loss(row, high)) + 1e-9


def test_extreme_logits_give_finite_losses_and_gradients():
    teacher = torch.tensor([[1e4, -1e4, 0.0]])
    student = torch.tensor([[-1e4, 1e4, 0.0]], requires_grad=True)
    loss = soft_target_loss(student, teacher, 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_t_squared_keeps_the_gradient_norm_at_high_temperatures():
    student, teacher = torch.randn(8, 10), torch.randn(8, 10)
    norms = []
    for temperature in (10.0, 40.0, 160.0):
        leaf = student.clone().requires_grad_()
        soft_target_loss(leaf, teacher, temperature).backward()
        norms.append(leaf.grad.norm().item())
    assert max(norms) < 1.1 * min(norms)


def test_the_term_is_weighted_and_does_not_need_labels():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    term = SoftTargetTerm(temperature=2.0, loss_weight=0.3)
    found = term(Batch(torch.zeros(4, 1)), Outputs(student), Outputs(teacher))
    torch.testing.assert_close(found, 0.3 * soft_target_loss(student, teacher, 2.0))


def losses(method, batch):
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    attached = method.attach(student, AttachContext(teacher=teacher))
    objective = Objective(attached.model, attached.terms, teacher, label_weight=attached.label_weight)
    return objective(batch), student, teacher


def test_losses_of_soft_targets_and_labels_are_weighted():
    batch = Batch(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    found, student, teacher = losses(SoftTargets(temperature=3, loss_weight=0.7, label_weight=0.2), batch)
    logits_now = student(batch.images)
    torch.testing.assert_close(found["labels"], 0.2 * nn.functional.cross_entropy(logits_now, batch.targets))
    torch.testing.assert_close(found["soft_targets"], 0.7 * soft_target_loss(logits_now, teacher(batch.images), 3))


def test_with_label_weight_zero_labels_are_ignored_and_optional():
    images = torch.randn(6, 4)
    unlabelled, student, _ = losses(SoftTargets(label_weight=0), Batch(images))
    assert list(unlabelled) == ["soft_targets"]
    sum(unlabelled.values()).backward()
    assert student.weight.grad.abs().sum() > 0
    labelled, _, _ = losses(SoftTargets(label_weight=0), Batch(images, torch.full((6,), 99)))
    assert torch.equal(labelled["soft_targets"], unlabelled["soft_targets"])


def test_attach_does_not_change_the_model():
    student = nn.Linear(4, 3)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    attached = SoftTargets().attach(student, AttachContext(teacher=nn.Linear(4, 3)))
    assert attached.model is student
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    attached.begin()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_loss_weight_zero_adds_no_term():
    attached = SoftTargets(loss_weight=0).attach(nn.Linear(4, 3), AttachContext(teacher=nn.Linear(4, 3)))
    assert attached.terms == ()


def test_a_missing_teacher_raises():
    with pytest.raises(InputError, match="needs a teacher"):
        SoftTargets().attach(nn.Linear(4, 3), AttachContext())


@pytest.mark.parametrize(
    "values",
    [{"temperature": 0}, {"temperature": -1}, {"loss_weight": -0.1}, {"label_weight": -1}, {"T": 4}],
    ids=lambda values: next(iter(values)),
)
def test_invalid_values_raise(values):
    with pytest.raises(InputError):
        SoftTargets(**values)
