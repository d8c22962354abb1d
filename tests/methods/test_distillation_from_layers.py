"""Methods that compare layers: pairs, their own trainable modules, and combinations with compression."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from loaders import Loader
from torch import nn

from recorded_progress import RecordedProgress
from tersor.core.errors import InputError
from tersor.core.target import Target
from tersor.data.batch import Batch
from tersor.graph.feature_extraction import FeatureExtractor
from tersor.methods.attention_transfer import AttentionTransfer
from tersor.methods.channel_pruning import ChannelPruning
from tersor.methods.crd import CRD
from tersor.methods.dkd import DKD
from tersor.methods.factor_transfer import FactorTransfer
from tersor.methods.fitnet import FitNet
from tersor.methods.qat import QAT
from tersor.methods.reviewkd import ReviewKD
from tersor.methods.weight_pruning import WeightPruning
from tersor.models import build
from tersor.training.context import AttachContext
from tersor.training.layer_pairs import match_layers
from tersor.training.loop import fit
from tersor.training.method import chain
from tersor.training.objective import Objective, Outputs
from tersor.training.options import OptimizerOptions, Training


def networks(student="resnet20", teacher="resnet32"):
    torch.manual_seed(0)
    return build(student, 10), build(teacher, 10).eval()


def losses(attached, teacher, batch=None):
    objective = Objective(
        attached.model, attached.terms, teacher, layers=attached.layers, label_weight=attached.label_weight
    )
    return objective, objective(batch or next(iter(Loader())))


METHODS = [
    AttentionTransfer(),
    FactorTransfer(paraphraser_epochs=1, paraphraser_learning_rate=0.01),
    FitNet(),
    ReviewKD(),
    CRD(negatives=8, width=16),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_student_and_term_get_gradients_and_the_teacher_does_not(method):
    student, teacher = networks()
    attached = method.attach(student, AttachContext(data=Loader(), teacher=teacher, steps=10))
    attached.begin()
    objective, found = losses(attached, teacher)
    (name,) = [each for each in found if each != "labels"]
    assert name == attached.terms[0].name
    found[name].backward()
    assert torch.isfinite(found[name])
    assert student.conv1.weight.grad.abs().sum() > 0
    learning = [parameter for parameter in attached.terms[0].parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in learning)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher.training
    assert objective.training


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_modules_of_a_term_are_initialized_from_the_methods_seed(method):
    def parts(noise):
        torch.manual_seed(noise)
        student, teacher = networks()
        torch.rand(noise)
        return method.attach(student, AttachContext(data=Loader(), teacher=teacher, steps=10)).terms[0].state_dict()

    first, second = parts(1), parts(5)
    assert all(torch.equal(first[key], second[key]) or torch.isnan(first[key]).all() for key in first)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize(("student", "teacher"), [("resnet20", "resnet18"), ("mobilenet_v2", "resnet20")])
def test_student_and_teacher_can_belong_to_different_families(method, student, teacher):
    pupil, master = networks(student, teacher)
    attached = method.attach(pupil, AttachContext(data=Loader(), teacher=master, steps=10))
    attached.begin()
    _, found = losses(attached, master)
    assert all(torch.isfinite(loss) for loss in found.values())


def test_transformers_and_convolutional_networks_can_distill_each_other():
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    transformer = VisionTransformer(16, 4, 2, 2, 24, 48, num_classes=10)
    network = build("resnet20", 10)
    for pupil, master, layers in (
        (network, transformer, ("layer3", "encoder")),
        (transformer, network, ("encoder", "layer3")),
    ):
        for method in (AttentionTransfer, FitNet, ReviewKD):
            made = method(layers=layers[:1], teacher_layers=layers[1:])
            attached = made.attach(
                copy.deepcopy(pupil), AttachContext(data=Loader(), teacher=copy.deepcopy(master).eval(), steps=10)
            )
            _, found = losses(attached, copy.deepcopy(master).eval())
            assert all(torch.isfinite(loss) for loss in found.values())


def test_layers_that_cannot_be_paired_raise():
    student, teacher = networks()
    given = {"data": Loader(), "method": "fitnet"}
    with pytest.raises(InputError, match=r"fitnet needs a teacher"):
        match_layers(student, None, (), (), **given)
    with pytest.raises(InputError, match=r"fitnet needs images"):
        match_layers(student, teacher, (), (), None, method="fitnet")
    with pytest.raises(InputError, match=r"3 of the student \(layer1, layer2, layer3\) and 1 of the teacher"):
        match_layers(student, teacher, ("layer?",), ("layer3",), **given)
    with pytest.raises(InputError, match=r"teacher_layers but no layers"):
        match_layers(student, teacher, (), ("layer3",), **given)
    with pytest.raises(InputError, match=r"the student has no layer 'block3'"):
        match_layers(student, teacher, ("block3",), (), **given)
    with pytest.raises(InputError, match=r"the student's layer linear has shape \(2, 10\)\. Possible: feature maps"):
        match_layers(student, teacher, ("linear",), (), **given)


def test_shape_changes_after_layer_pairing_raise():
    student, teacher = networks()
    methods = [FitNet(), ChannelPruning(keep_macs=0.7, estimation_images=32)]
    with pytest.raises(
        InputError, match=r"ChannelPruning changes shapes, but .* paired layers with those of the teacher: layer3"
    ):
        chain(methods, student, AttachContext(data=Loader(), teacher=teacher, steps=4))


def test_without_a_regressor_the_channels_must_be_equal():
    student, teacher = networks("resnet20", "resnet32")
    found = FitNet(regressor=False).attach(student, AttachContext(data=Loader(), teacher=teacher))
    assert not list(found.terms[0].parameters())
    wide = build("resnet8x4", 10)
    with pytest.raises(InputError, match=r"layer3 \(64 channels\) with layer3 \(256 channels\), since"):
        FitNet(regressor=False).attach(student, AttachContext(data=Loader(), teacher=wide))


def test_the_paraphraser_is_trained_before_the_student_and_then_frozen():
    student, teacher = networks()
    method = FactorTransfer(paraphraser_epochs=8, paraphraser_learning_rate=0.05, batch_norm=True)
    progress = RecordedProgress()
    context = AttachContext(data=Loader(), teacher=teacher, steps=10, progress=progress)
    attached = method.attach(student, context)
    assert np.isnan(attached.metrics["reconstruction"]["errors"]).all(), "not trained yet"
    attached.begin()
    (task,) = progress.tasks
    assert (task.total, task.done) == (32, list(range(1, 33)))
    shorter = FactorTransfer(paraphraser_epochs=1, paraphraser_learning_rate=0.05, batch_norm=True)
    once = shorter.attach(student, AttachContext(data=Loader(), teacher=teacher, steps=10))
    once.begin()
    metrics = attached.metrics["reconstruction"]
    assert len(metrics["errors"]) == 8
    assert metrics["errors"][-1] < once.metrics["reconstruction"]["errors"][-1]
    with torch.no_grad():
        features = FeatureExtractor(teacher, ["layer3"])(next(iter(Loader())).images)[1]["layer3"][:6]
        again = attached.terms[0].paraphraser(features)
    for when, values in (("before", features), ("after", again)):
        assert np.allclose(metrics[when], values.abs().mean(1), atol=1e-5), when
    assert attached.extra_state["paraphraser.encoder.0.weight"].equal(attached.terms[0].paraphraser.encoder[0].weight)
    term = attached.terms[0]
    before = copy.deepcopy(term.state_dict())
    fit(attached, Loader(), Training(optimizer=OptimizerOptions(learning_rate=0.05)), steps=4, teacher=teacher)
    for key, value in term.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith(("paraphraser.", "errors", "maps")), key


@pytest.mark.parametrize(("rate", "channels"), [(0.25, 16), (0.5, 32), (1.0, 64), (1.5, 96)])
def test_the_paraphrase_rate_is_relative_to_the_teachers_channels(rate, channels):
    student, teacher = networks()
    term = FactorTransfer(paraphrase_rate=rate).attach(student, AttachContext(data=Loader(), teacher=teacher)).terms[0]
    factor = term.paraphraser.encoder(torch.randn(2, 64, 4, 4))
    assert factor.shape == (2, channels, 4, 4)
    assert term.translator(torch.randn(2, 64, 4, 4)).shape == factor.shape
    assert term.paraphraser(torch.randn(2, 64, 4, 4)).shape == (2, 64, 4, 4)
    convolutions = [part for part in term.modules() if isinstance(part, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(convolutions) == 9
    assert all(part.bias is not None for part in convolutions)


def test_dkd_needs_labels_and_has_a_warmup():
    student, teacher = networks()
    attached = DKD(warmup=0.5).attach(student, AttachContext(teacher=teacher, steps=8))
    images = Loader().images[:4]
    with pytest.raises(InputError, match="dkd needs the target class of every image"):
        attached.terms[0](Batch(images), Outputs(student(images)), Outputs(teacher(images)))
    factors = []
    for step in range(6):
        factors.append(float(attached.terms[0].warmup))
        attached.after_step(step, None)
    assert factors == [0.25, 0.5, 0.75, 1, 1, 1]
    assert float(DKD(warmup=0).attach(student, AttachContext(teacher=teacher, steps=8)).terms[0].warmup) == 1


def test_crd_updates_the_memories_of_the_images_in_the_batch():
    student, teacher = networks()
    attached = CRD(negatives=8, width=16).attach(student, AttachContext(data=Loader(), teacher=teacher))
    term = attached.terms[0]
    before = term.of_student.clone()
    losses(attached, teacher)
    changed = (term.of_student != before).any(1)
    assert changed[:8].all()
    assert not changed[8:].any()
    assert torch.allclose(term.of_student[:8].norm(dim=1), torch.ones(8))
    assert term.log_z.isfinite().all()
    with pytest.raises(InputError, match=r"no image indices\. Set Batch\.index"):
        losses(attached, teacher, Batch(Loader().images[:8], Loader().targets[:8]))
    with pytest.raises(InputError, match="crd stores an embedding of every image"):
        CRD().attach(student, AttachContext(data=[Loader().images], teacher=teacher))


def test_layer_distillation_is_combined_with_pruning_and_quantization_in_one_stage():
    student, teacher = networks("resnet20", "resnet20")
    methods = [
        ChannelPruning(keep_macs=0.7, estimation_images=32),
        WeightPruning(sparsity=0.8, sparsity_schedule="cubic", every=1),
        QAT(calibration_images=32),
        FactorTransfer(layer="layer3", paraphraser_epochs=1, paraphraser_learning_rate=0.01),
        AttentionTransfer(layers=("layer?",)),
    ]
    attached = chain(
        methods, student, AttachContext(data=Loader(), teacher=teacher, steps=4, target=Target(cpu="vnni"))
    )
    attached.begin()
    found = fit(attached, Loader(), Training(optimizer=OptimizerOptions(learning_rate=0.01)), steps=4, teacher=teacher)
    attached.finish()
    assert set(found.losses) == {"labels", "factor_transfer", "attention_transfer"}
    assert torch.isfinite(attached.model(Loader().images)).all()
