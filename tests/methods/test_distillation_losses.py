"""The distillation losses compared with slow implementations of their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tersor.methods.attention_transfer import attention_loss, attention_map
from tersor.methods.crd import contrastive_loss
from tersor.methods.dist import correlation_distance
from tersor.methods.dkd import decoupled
from tersor.methods.factor_transfer import factor_loss
from tersor.methods.reviewkd import hierarchical_loss
from tersor.methods.soft_targets import soft_target_loss, standardized

seeds = st.integers(0, 2**31 - 1)


def drawn(seed, *shapes):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes]


def softmax(row):
    largest = max(row)
    powers = [math.exp(value - largest) for value in row]
    return [power / sum(powers) for power in powers]


def kl(teacher, student):
    return sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True) if p > 0)


@given(seeds, st.sampled_from([1, 2, 4]))
def test_attention_loss_equals_a_slow_implementation(seed, p):
    (a, b) = drawn(seed, (2, 3, 4, 5), (2, 6, 4, 5))

    def attention(image):
        flat = [sum(abs(float(c[y, x])) ** p for c in image) for y in range(4) for x in range(5)]
        length = math.sqrt(sum(value**2 for value in flat))
        return [value / length for value in flat]

    squares, norms = [], []
    for ours, theirs in zip(a, b, strict=True):
        difference = [x - y for x, y in zip(attention(ours), attention(theirs), strict=True)]
        squares += [value**2 for value in difference]
        norms.append(math.sqrt(sum(value**2 for value in difference)))
    assert float(attention_loss(a, b, p)) == pytest.approx(sum(squares) / 40, rel=1e-5, abs=1e-9)
    assert float(attention_loss(a, b, p, "paper")) == pytest.approx(sum(norms) / 2 / (2 * 20), rel=1e-5, abs=1e-9)


def test_scaled_features_have_the_same_attention():
    (a,) = drawn(0, (2, 3, 4, 4))
    assert float(attention_loss(a, 7 * a, 2)) == pytest.approx(0, abs=1e-12)
    assert attention_map(a, 2).norm(dim=1).tolist() == pytest.approx([1, 1])


@given(seeds, st.sampled_from([1, 2]))
def test_factor_loss_equals_a_slow_implementation(seed, p):
    (a, b) = drawn(seed, (2, 4, 3, 3), (2, 4, 3, 3))
    total = 0.0
    for ours, theirs in zip(a.flatten(1).tolist(), b.flatten(1).tolist(), strict=True):
        lengths = [math.sqrt(sum(value**2 for value in each)) for each in (ours, theirs)]
        total += sum(abs(x / lengths[0] - y / lengths[1]) ** p for x, y in zip(ours, theirs, strict=True))
    assert float(factor_loss(a, b, p)) == pytest.approx(total / 2 / 36 ** (1 - p / 2), rel=1e-5)


@pytest.mark.parametrize("p", [1, 2])
def test_the_scale_of_the_factor_loss_does_not_depend_on_the_number_of_channels(p):
    few, many = ([*drawn(seed, (8, channels, 8, 8), (8, channels, 8, 8))] for seed, channels in ((1, 16), (2, 128)))
    assert float(factor_loss(*few, p)) == pytest.approx(float(factor_loss(*many, p)), rel=0.05)


def test_the_factor_loss_at_the_authors_feature_size_equals_that_of_the_authors():
    (a, b) = drawn(3, (4, 32, 8, 8), (4, 32, 8, 8))
    authors = 500 * (F.normalize(a.flatten(1)) - F.normalize(b.flatten(1))).abs().mean()
    assert 500 / 2048 * math.sqrt(2048) * float(factor_loss(a, b, 1)) == pytest.approx(float(authors), rel=1e-5)


@given(seeds, st.sampled_from([1.0, 2.0, 4.0]))
def test_decoupled_losses_equal_a_slow_implementation(seed, temperature):
    (a, b) = (3 * values for values in drawn(seed, (3, 5), (3, 5)))
    labels = torch.tensor([0, 3, 4])
    target = others = 0.0
    for ours, theirs, label in zip(a.tolist(), b.tolist(), labels.tolist(), strict=True):
        p, q = ([value / temperature for value in row] for row in (theirs, ours))
        of_teacher, of_student = softmax(p), softmax(q)
        target += kl([of_teacher[label], 1 - of_teacher[label]], [of_student[label], 1 - of_student[label]])
        rest = [[value for place, value in enumerate(row) if place != label] for row in (p, q)]
        others += kl(softmax(rest[0]), softmax(rest[1]))
    found = decoupled(a, b, labels, temperature)
    assert float(found[0]) == pytest.approx(temperature**2 * target / 3, rel=1e-5, abs=1e-9)
    assert float(found[1]) == pytest.approx(temperature**2 * others / 3, rel=1e-5, abs=1e-9)


@given(seeds)
def test_tckd_and_nckd_sum_to_the_soft_target_loss(seed):
    (a, b) = drawn(seed, (1, 6), (1, 6))
    label = torch.tensor([2])
    target, others = decoupled(a, b, label, 2.0)
    share = 1 - float((b / 2).softmax(1)[0, 2])
    assert float(target + share * others) == pytest.approx(float(soft_target_loss(a, b, 2.0)), rel=1e-5, abs=1e-9)


def test_extreme_logits_give_finite_decoupled_losses():
    sure = torch.tensor([[200.0, 0.0, 0.0]])
    found = decoupled(torch.zeros(1, 3), sure, torch.tensor([0]), 1.0)
    assert all(torch.isfinite(each) for each in found)


@given(seeds)
def test_correlation_distance_equals_a_slow_implementation(seed):
    (a, b) = drawn(seed, (4, 6), (4, 6))
    total = 0.0
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        means = sum(x) / 6, sum(y) / 6
        along = sum((p - means[0]) * (q - means[1]) for p, q in zip(x, y, strict=True))
        lengths = [math.sqrt(sum((v - m) ** 2 for v in row)) for row, m in zip((x, y), means, strict=True)]
        total += 1 - along / (lengths[0] * lengths[1])
    assert float(correlation_distance(a, b)) == pytest.approx(total / 4, rel=1e-5, abs=1e-9)


def test_correlation_ignores_scale_and_shift():
    (a,) = drawn(1, (3, 5))
    assert float(correlation_distance(a, 5 * a + 2)) == pytest.approx(0, abs=1e-6)


@given(seeds)
def test_hierarchical_loss_equals_a_slow_implementation(seed):
    (a, b) = (values.float() for values in drawn(seed, (2, 3, 8, 8), (2, 3, 8, 8)))

    def pooled(values, level):
        step = 8 // level
        corners = [(y * step, x * step) for y in range(level) for x in range(level)]
        return [
            [float(channel[y : y + step, x : x + step].mean()) for y, x in corners]
            for image in values
            for channel in image
        ]

    total, weights = 0.0, 0.0
    for weight, level in ((1, 8), (0.5, 4), (0.25, 2), (0.125, 1)):
        squares = [
            (p - q) ** 2
            for x, y in zip(pooled(a, level), pooled(b, level), strict=True)
            for p, q in zip(x, y, strict=True)
        ]
        total += weight * sum(squares) / len(squares)
        weights += weight
    assert float(hierarchical_loss(a, b)) == pytest.approx(total / weights, rel=1e-5)


@given(seeds)
def test_contrastive_loss_equals_a_slow_implementation(seed):
    draw = torch.Generator().manual_seed(seed)
    similar = torch.rand(3, 5, generator=draw, dtype=torch.float64) + 0.1
    total = 0.0
    for row in similar.tolist():
        m = 4 / 50
        total -= math.log(row[0] / (row[0] + m + 1e-7))
        total -= sum(math.log(m / (other + m + 1e-7)) for other in row[1:])
    assert float(contrastive_loss(similar[:, 0].log(), similar[:, 1:].log(), 50)) == pytest.approx(total / 3, rel=1e-5)


@given(seeds)
def test_standardized_logits_equal_a_slow_implementation(seed):
    (logits,) = drawn(seed, (3, 6))
    for row, found in zip(logits.tolist(), standardized(logits).tolist(), strict=True):
        mean = sum(row) / 6
        deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / 5)
        assert found == pytest.approx([(value - mean) / deviation for value in row], rel=1e-5, abs=1e-9)
    assert torch.allclose(standardized(logits), standardized(7 * logits + 3), atol=1e-5)


def test_nearly_constant_logits_have_bounded_gradients():
    (teacher,) = drawn(0, (4, 10))
    for deviation in (0.0, 1e-6):
        student = (deviation * drawn(1, (4, 10))[0]).requires_grad_()
        soft_target_loss(standardized(student), standardized(teacher), 2.0).backward()
        assert student.grad.isfinite().all()
        assert float(student.grad.abs().max()) < 100
