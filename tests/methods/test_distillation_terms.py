"""The terms of `attach` compared with their formulas, for every option of a method.

The formulas are those of `test_distillation_losses.py`; these tests combine pairs, pooling, weights and options.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from loaders import Loader

from tersor.core.errors import InputError
from tersor.data.batch import Batch
from tersor.graph.feature_extraction import FeatureExtractor
from tersor.methods.attention_transfer import AttentionTransfer, attention_loss
from tersor.methods.crd import CRD
from tersor.methods.dist import DIST, correlation_distance
from tersor.methods.dkd import DKD, decoupled
from tersor.methods.factor_transfer import FactorTransfer, factor_loss
from tersor.methods.fitnet import FitNet
from tersor.methods.reviewkd import ReviewKD, hierarchical_loss
from tersor.methods.soft_targets import SoftTargets, soft_target_loss, standardized
from tersor.models import build
from tersor.training.context import AttachContext
from tersor.training.layer_pairs import match_layer, match_layers
from tersor.training.method import chain
from tersor.training.objective import Objective, Outputs


@pytest.fixture
def networks():
    """A student with maps of 16, 8 and 4 pixels a side, and a teacher with 8, 4, 2 and 1."""
    torch.manual_seed(0)
    return build("resnet20", 10), build("resnet18", 10).eval()


def attached_outputs(method, networks, layers=()):
    """The attachment, a batch, and the outputs of student and teacher for it."""
    student, teacher = networks
    attached = method.attach(student, AttachContext(data=Loader(), teacher=teacher, steps=8))
    batch = next(iter(Loader()))
    paths = layers or attached.layers
    with torch.no_grad():
        ours, theirs = (
            Outputs(*FeatureExtractor(copy.deepcopy(network).eval(), [pair[place] for pair in paths])(batch.images))
            for place, network in enumerate(networks)
        )
    return attached, batch, ours, theirs


def pooled_to_smaller(ours, theirs):
    """Both maps, pooled to the smaller size."""
    side = min(ours.shape[2], theirs.shape[2])
    return F.adaptive_avg_pool2d(ours, side), F.adaptive_avg_pool2d(theirs, side)


def same(found, expected):
    assert torch.as_tensor(found).item() == pytest.approx(torch.as_tensor(expected).item(), rel=1e-5)


@pytest.mark.parametrize("standardize", [False, True])
def test_soft_targets(networks, standardize):
    method = SoftTargets(temperature=3, loss_weight=0.7, label_weight=0.2, standardize=standardize)
    attached, batch, ours, theirs = attached_outputs(method, networks)
    logits = [standardized(each.logits) if standardize else each.logits for each in (ours, theirs)]
    same(attached.terms[0](batch, ours, theirs), 0.7 * soft_target_loss(*logits, 3))
    assert attached.label_weight == 0.2


@pytest.mark.parametrize("mode", ["code", "paper"])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_attention_transfer_term_equals_its_formula(networks, p, mode):
    method = AttentionTransfer(p=p, mode=mode, loss_weight=30, label_weight=0.2)
    attached, batch, ours, theirs = attached_outputs(method, networks)
    assert len(attached.layers) == 3
    maps = [pooled_to_smaller(ours.layers[a], theirs.layers[b]) for a, b in attached.layers]
    assert len({ours.layers[a].shape[2] for a, _ in attached.layers}) == 3
    same(attached.terms[0](batch, ours, theirs), 30 * sum(attention_loss(*both, p, mode) for both in maps))
    assert attached.label_weight == 0.2


@pytest.mark.parametrize(("layer", "teacher_layer"), [("layer3", "relu"), ("layer1", "layer2")])
@pytest.mark.parametrize("p", [1, 2])
def test_factor_transfer_term_equals_its_formula(networks, p, layer, teacher_layer):
    method = FactorTransfer(layer=layer, teacher_layer=teacher_layer, p=p, loss_weight=7, label_weight=0.2)
    attached, batch, ours, theirs = attached_outputs(method, networks)
    (term,) = attached.terms
    factor = term.paraphraser.encoder(theirs.layers[teacher_layer])
    side = min(ours.layers[layer].shape[2], factor.shape[2])
    translated = term.translator(F.adaptive_avg_pool2d(ours.layers[layer], side))
    expected = 7 * factor_loss(translated, F.adaptive_avg_pool2d(factor, side), p)
    same(term(batch, ours, theirs), expected)
    assert attached.label_weight == 0.2


@pytest.mark.parametrize("reconstruction", ["absolute", "squared"])
def test_the_paraphraser_minimizes_the_selected_error(networks, reconstruction):
    method = FactorTransfer(paraphraser_epochs=1, paraphraser_learning_rate=0.01, reconstruction=reconstruction)
    student, teacher = networks
    batch = next(iter(Loader()))
    attached = method.attach(student, AttachContext(data=[batch], teacher=teacher))
    paraphraser = copy.deepcopy(attached.terms[0].paraphraser).requires_grad_()
    with torch.no_grad():
        features = FeatureExtractor(teacher, [attached.layers[0][1]])(batch.images)[1][attached.layers[0][1]]
    error = paraphraser(features) - features
    (error.abs() if reconstruction == "absolute" else error.square()).mean().backward()
    attached.begin()
    for before, after in zip(paraphraser.parameters(), attached.terms[0].paraphraser.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.01 * (before.grad + 5e-4 * before), rtol=1e-4, atol=1e-7)
    metrics = attached.metrics["reconstruction"]
    assert metrics["layer"] == attached.layers[0][1]
    assert metrics["errors"] == [pytest.approx(float(error.detach().abs().mean() / features.abs().mean()), rel=1e-4)]
    for name, maps in (("before", features), ("after", attached.terms[0].paraphraser(features))):
        averaged = F.adaptive_avg_pool2d(maps[:6].abs().mean(1), min(8, maps.shape[2]))
        torch.testing.assert_close(torch.tensor(metrics[name]), averaged.detach())


def test_a_diverging_paraphraser_raises(networks):
    student, teacher = networks
    method = FactorTransfer(layer="layer1", paraphraser_epochs=1, paraphraser_learning_rate=100)
    with pytest.raises(InputError, match="smaller paraphraser_learning_rate"):
        method.attach(student, AttachContext(data=Loader(), teacher=teacher)).begin()


def test_decoupled_term_equals_its_formula(networks):
    method = DKD(alpha=0.5, beta=3, temperature=2, label_weight=0.2, warmup=0.5)
    attached, batch, ours, theirs = attached_outputs(method, networks)
    target, others = decoupled(ours.logits, theirs.logits, batch.targets, 2)
    same(attached.terms[0](batch, ours, theirs), 0.25 * (0.5 * target + 3 * others))
    attached.after_step(0, None)
    same(attached.terms[0](batch, ours, theirs), 0.5 * (0.5 * target + 3 * others))
    assert attached.label_weight == 0.2


def test_correlation_term_equals_its_formula(networks):
    attached, batch, ours, theirs = attached_outputs(DIST(beta=0.5, gamma=3, temperature=2, label_weight=0.2), networks)
    probabilities = [(each.logits / 2).softmax(1) for each in (ours, theirs)]
    inter, intra = correlation_distance(*probabilities), correlation_distance(*(each.T for each in probabilities))
    same(attached.terms[0](batch, ours, theirs), 4 * (0.5 * inter + 3 * intra))
    assert attached.label_weight == 0.2


def test_fitnet_term_equals_its_formula(networks):
    method = FitNet(layers=("layer3", "layer1"), teacher_layers=("relu", "layer2"), loss_weight=7, label_weight=0.2)
    attached, batch, ours, theirs = attached_outputs(method, networks)
    (term,) = attached.terms
    expected = 0.0
    for (a, b), regressor in zip(attached.layers, term.regressors, strict=True):
        mine, target = pooled_to_smaller(ours.layers[a], theirs.layers[b])
        regressed = torch.einsum("oc,nchw->nohw", regressor.weight[:, :, 0, 0], mine) + regressor.bias[:, None, None]
        expected += (regressed - target).square().mean()
    same(term(batch, ours, theirs), 7 * expected)
    assert attached.label_weight == 0.2


def test_review_term_equals_its_formula(networks, monkeypatch):
    attached, batch, ours, theirs = attached_outputs(ReviewKD(loss_weight=7, label_weight=0.2, warmup=0.5), networks)
    reviewed = []
    monkeypatch.setattr(
        "tersor.methods.reviewkd.hierarchical_loss",
        lambda *both: reviewed.append(hierarchical_loss(*both)) or reviewed[-1],
    )
    found = attached.terms[0](batch, ours, theirs)
    assert len(reviewed) == 4
    same(found, 0.25 * 7 * sum(reviewed))
    assert attached.label_weight == 0.2


def test_review_sorts_layers_from_late_to_early(networks):
    there, back = (
        attached_outputs(ReviewKD(layers=names, teacher_layers=names), networks)
        for names in (("layer1", "layer2", "layer3"), ("layer3", "layer2", "layer1"))
    )
    assert there[0].layers == back[0].layers
    same(there[0].terms[0](*there[1:]), back[0].terms[0](*back[1:]))


def test_review_loss_of_a_single_image_is_finite(networks):
    student, teacher = networks
    attached = ReviewKD().attach(student, AttachContext(data=Loader(), teacher=teacher, steps=4))
    objective = Objective(student, attached.terms, teacher, layers=attached.layers).train()
    losses = objective(Batch(Loader().images[:1], Loader().targets[:1]))
    torch.stack([*losses.values()]).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(bool(buffer.isfinite().all()) for buffer in attached.terms[0].buffers())


def test_contrastive_term_equals_its_formula(networks, monkeypatch):
    method = CRD(negatives=6, width=16, tau=0.5, loss_weight=0.3, label_weight=0.2)
    attached, batch, ours, theirs = attached_outputs(method, networks)
    (term,) = attached.terms
    drawn = torch.randint(32, (8, 6))
    monkeypatch.setattr(torch, "randint", lambda *_args, **_kwargs: drawn)
    total = 0.0
    ((a, b),) = attached.layers
    sides = (
        (ours.layers[a], term.student_embedding, term.of_teacher),
        (theirs.layers[b], term.teacher_embedding, term.of_student),
    )
    for features, embedding, memory in sides:
        anchors = embedding(features.mean((2, 3)))
        anchors = anchors / anchors.norm(dim=1, keepdim=True)
        place = torch.cat([batch.index[:, None], drawn], 1)
        h = torch.stack([(memory[row] @ anchor / 0.5).exp() for row, anchor in zip(place, anchors, strict=True)])
        h = h / (h.mean() * 32)
        m = 6 / 32
        total -= ((h[:, 0] / (h[:, 0] + m)).log() + (m / (h[:, 1:] + m)).log().sum(1)).mean()
    same(term(batch, ours, theirs), 0.3 * total)
    assert attached.label_weight == 0.2


METHODS = [
    (SoftTargets, {"loss_weight": 0.0}),
    (DKD, {"alpha": 0.0, "beta": 0.0}),
    (DIST, {"beta": 0.0, "gamma": 0.0}),
    (AttentionTransfer, {"loss_weight": 0.0}),
    (FactorTransfer, {"loss_weight": 0.0}),
    (FitNet, {"loss_weight": 0.0}),
    (ReviewKD, {"loss_weight": 0.0}),
    (CRD, {"loss_weight": 0.0}),
]


@pytest.mark.parametrize(("method", "off"), METHODS)
def test_without_its_loss_a_method_leaves_the_label_weight_or_turns_it_off(networks, method, off):
    student, teacher = networks
    given = {"data": Loader(), "teacher": teacher, "steps": 8}
    assert method(**off).attach(student, AttachContext(**given)).label_weight == 1
    assert method(**off, label_weight=0).attach(student, AttachContext(**given)).label_weight == 0


def test_a_layer_can_be_in_several_pairs_and_duplicate_pairs_are_dropped(networks):
    pairs = match_layers(*networks, ("layer3", "layer3"), ("layer2", "layer3"), Loader(), method="fitnet")
    assert [pair.paths for pair in pairs] == [("layer3", "layer2"), ("layer3", "layer3")]
    pairs = match_layers(*networks, ("layer?", "layer3"), ("layer[123]", "layer3"), Loader(), method="fitnet")
    assert [pair.student for pair in pairs] == ["layer1", "layer2", "layer3"]


@pytest.mark.parametrize(
    ("layer", "teacher_layer", "message"),
    [
        ("layer?", "", r"takes one layer, and 'layer\?' matches 3 of the student: layer1, layer2, layer3\. Write one"),
        ("layer3", "layer?", r"'layer\?' matches 4 of the teacher"),
        ("", "layer3", r"has teacher_layer but no layer\."),
        ("layer9", "", "the student has no layer 'layer9'"),
    ],
)
def test_patterns_that_do_not_select_exactly_one_layer_raise(networks, layer, teacher_layer, message):
    with pytest.raises(InputError, match=message):
        match_layer(*networks, layer, teacher_layer, Loader(), method="crd")


def test_notes_name_the_layer_pairs(networks):
    student, teacher = networks
    methods = [FitNet(), SoftTargets(), AttentionTransfer(layers=("layer1",))]
    attached = chain(methods, student, AttachContext(data=Loader(), teacher=teacher, steps=4))
    assert attached.notes == (
        "fitnet compares layer3 (student) with layer2 (teacher).",
        "attention_transfer compares layer1 (student) with layer1 (teacher).",
    )


def test_a_paraphraser_accepts_features_of_any_precision(networks):
    student, teacher = networks
    batch = Batch(Loader().images.double(), Loader().targets)
    method = FactorTransfer(paraphraser_epochs=1, paraphraser_learning_rate=0.01)
    attached = method.attach(student.double(), AttachContext(data=[batch], teacher=teacher.double()))
    attached.begin()
    assert attached.terms[0].errors.isfinite().all()


@pytest.mark.parametrize("weights", [{"beta": 1.0, "gamma": 0.0}, {"beta": 0.0, "gamma": 1.0}])
def test_one_of_the_two_correlations_is_enough(networks, weights):
    student, teacher = networks
    assert len(DIST(**weights).attach(student, AttachContext(teacher=teacher)).terms) == 1
