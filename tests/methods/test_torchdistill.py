"""The losses equal those of torchdistill, where its formula is that of the paper."""

from __future__ import annotations

import pytest
import torch

from tersor.data.batch import Batch
from tersor.methods.attention_transfer import attention_loss
from tersor.methods.crd import contrastive_loss
from tersor.methods.dist import DIST, CorrelationTerm
from tersor.methods.factor_transfer import factor_loss
from tersor.methods.reviewkd import hierarchical_loss
from tersor.methods.soft_targets import soft_target_loss, standardized
from tersor.training.objective import Outputs

theirs = pytest.importorskip("torchdistill.losses.mid_level")

PATHS = {
    "student_module_path": "s",
    "student_module_io": "o",
    "teacher_module_path": "t",
    "teacher_module_io": "o",
}


def drawn(*shapes):
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(*shape, generator=draw) for shape in shapes]


def given(student, teacher):
    return {"s": {"o": student}}, {"t": {"o": teacher}}


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_targets(temperature):
    student, teacher = drawn((8, 10), (8, 10))
    loss = theirs.KDLoss(**PATHS, temperature=temperature, alpha=0.1, beta=0.9)
    labels = torch.arange(8)
    expected = loss(*given(student, teacher), labels) - 0.1 * torch.nn.functional.cross_entropy(student, labels)
    assert float(0.9 * soft_target_loss(student, teacher, temperature)) == pytest.approx(float(expected), rel=1e-5)


def test_standardized_soft_targets_equal_torchdistill():
    student, teacher = drawn((8, 10), (8, 10))
    loss = theirs.LogitStdKDLoss(**PATHS, temperature=2.0, alpha=0.1, beta=9.0)
    labels = torch.arange(8)
    expected = loss(*given(student, teacher), labels) - 0.1 * torch.nn.functional.cross_entropy(student, labels)
    ours = 9 * soft_target_loss(standardized(student), standardized(teacher), 2.0)
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)


def test_attention_loss_equals_torchdistill():
    student, teacher = drawn((4, 6, 5, 5), (4, 9, 5, 5))
    pairs = {"pair": {"student": {"path": "s", "io": "o"}, "teacher": {"path": "t", "io": "o"}}}
    code, paper = (theirs.ATLoss(pairs, mode=mode)(*given(student, teacher)) for mode in ("code", "paper"))
    assert float(attention_loss(student, teacher, 2)) == pytest.approx(float(code), rel=1e-5)
    # the paper has beta / 2 before the norm; torchdistill leaves it to the weight
    ours = 2 * 25 * attention_loss(student, teacher, 2, "paper")
    assert float(ours) == pytest.approx(float(paper), rel=1e-5)


def test_factor_loss_equals_torchdistill():
    student, teacher = drawn((4, 32, 8, 8), (4, 32, 8, 8))
    expected = theirs.FTLoss(p=1)({"translator": {"output": student}}, {"paraphraser": {"output": teacher}})
    ours = factor_loss(student, teacher, 1) * 2048**0.5 / 2048  # their mean over all elements
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)


def test_correlation_loss_equals_torchdistill():
    student, teacher = drawn((8, 10), (8, 10))
    expected = theirs.DISTLoss(**PATHS, beta=0.5, gamma=2.0, tau=4.0)(*given(student, teacher))
    term = CorrelationTerm(DIST(beta=0.5, gamma=2.0, temperature=4.0))
    ours = term(Batch(torch.zeros(8, 3, 2, 2)), Outputs(student), Outputs(teacher))
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 7, 8, 12, 14, 32])
def test_hierarchical_loss_equals_torchdistill(side):
    student, teacher = drawn((4, 6, side, side), (4, 6, side, side))
    expected = theirs.HierarchicalContextLoss(**PATHS)(*given((student, None), teacher))
    assert float(hierarchical_loss(student, teacher)) == pytest.approx(float(expected), rel=1e-5)


def test_contrastive_loss_equals_torchdistill():
    (values,) = drawn((4, 9))
    similar = values.exp()
    loss = theirs.CRDLoss("n", "e", "n", input_size=16, output_size=50, num_negative_samples=8, num_samples=50)
    expected = loss.compute_contrast_loss(similar[:, :, None])
    assert float(contrastive_loss(values[:, 0], values[:, 1:], 50)) == pytest.approx(float(expected), rel=1e-5)
