from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor.core.errors import InputError
from tersor.data.batch import Batch, labels_of
from tersor.tasks.classification import Classification
from tersor.training.objective import LossTerm, Objective
from tersor.training.output_distance import OutputDistance


class Mean(LossTerm):
    """The weighted mean of the student's logits, minus the teacher's if there is one."""

    def __init__(self, weight, name="mean"):
        super().__init__()
        self.weight = weight
        self.name = name

    def forward(self, batch, student, teacher):
        logits = student.logits if teacher is None else student.logits - teacher.logits
        return self.weight * logits.mean()


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(0)
    return Batch(torch.randn(6, 4, generator=draw), torch.tensor([0, 1, 2, 0, 1, 2]))


def test_without_terms_the_loss_is_the_cross_entropy(batch):
    model = network().eval()
    objective = Objective(model, task=Classification(label_smoothing=0.1)).eval()
    losses = objective(batch)
    expected = F.cross_entropy(model(batch.images), batch.targets, label_smoothing=0.1)
    assert list(losses) == ["labels"]
    assert torch.equal(losses["labels"], expected)


def test_the_teacher_gets_no_gradients(batch):
    teacher = network()
    objective = Objective(network(), [Mean(2.0)], teacher)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    sum(objective.train()(batch).values()).backward()
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_label_weight_zero_ignores_the_labels(batch):
    objective = Objective(network(), [Mean(2.0)], label_weight=0)
    assert list(objective(batch)) == ["mean"]
    unlabelled = Objective(network(), [Mean(2.0)])
    assert list(unlabelled(Batch(batch.images))) == ["mean"]


def test_label_weight_scales_the_cross_entropy(batch):
    model = network().eval()
    whole = Objective(model).eval()(batch)["labels"]
    quarter = Objective(model, label_weight=0.25).eval()(batch)["labels"]
    torch.testing.assert_close(quarter, whole / 4)


def test_terms_with_the_same_name_are_added(batch):
    model = network().eval()
    twice = Objective(model, [Mean(1.0), Mean(2.0), Mean(1.0, "other")], label_weight=0).eval()(batch)
    assert list(twice) == ["mean", "other"]
    torch.testing.assert_close(twice["mean"], 3 * twice["other"])


def test_the_teacher_stays_in_eval_mode_and_gets_no_gradients(batch):
    teacher = network()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    objective = Objective(network(), [Mean(1.0)], teacher).train()
    assert objective.model.training
    assert not any(module.training for module in teacher.modules())
    sum(objective(batch).values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in objective.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_teacher_does_not_run_without_terms(batch):
    class Refuses(nn.Module):
        def forward(self, images):
            raise AssertionError

    assert list(Objective(network(), teacher=Refuses())(batch)) == ["labels"]


def test_autocast_runs_the_networks_in_bfloat16_and_returns_losses_in_float32(batch):
    seen = []
    model = nn.Linear(4, 3)
    model.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    losses = Objective(model, [Mean(1.0)], autocast=torch.bfloat16)(batch)
    assert seen == [torch.bfloat16]
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert model.weight.dtype == torch.float32


def test_a_network_with_several_outputs_in_training_mode_raises(batch):
    class WithHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return (self.linear(x), self.linear(x)) if self.training else self.linear(x)

    objective = Objective(WithHeads())
    assert list(objective.eval()(batch)) == ["labels"]
    with pytest.raises(InputError, match=r"in training mode the network returns a tuple, not logits.*aux_logits=False"):
        objective.train()(batch)


def test_neither_labels_nor_terms_raises(batch):
    with pytest.raises(InputError, match="the images have no labels, and no method adds a loss"):
        Objective(network())(Batch(batch.images))


def test_a_batch_of_images_only_has_no_labels():
    images = torch.randn(4, 3, 2, 2)
    for batch in (images, (images,), [images]):
        assert labels_of(batch) is None
    assert labels_of((images, torch.arange(4))).tolist() == [0, 1, 2, 3]


class NoInit(Mean):
    def __init__(self):
        self.weight = 1.0


class Named(LossTerm):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, batch, student, teacher):
        return student.logits.mean()


def test_a_term_that_does_not_call_super_init_raises():
    with pytest.raises(InputError, match=r"NoInit.__init__ does not .* call super\(\).__init__\(\) first"):
        Objective(network(), [NoInit()])


@pytest.mark.parametrize("name", ["", "labels"])
def test_an_empty_or_reserved_name_of_a_term_raises(name):
    with pytest.raises(InputError, match=f"the loss Named has the name '{name}'. Write `name` in the class"):
        Objective(network(), [Named(name)])


def test_terms_of_two_classes_with_the_same_name_raise():
    with pytest.raises(InputError, match="the losses Mean and Named have the same name 'mean'"):
        Objective(network(), [Mean(1.0), Named("mean")])


class Detached(LossTerm):
    name = "detached"

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, batch, student, teacher):
        return self.weight * student.logits.detach().square().mean()


def test_a_loss_without_a_gradient_raises(batch):
    objective = Objective(network(), [Detached(1.0)])
    with pytest.raises(InputError, match="the loss detached has no gradient with respect to the network's weights"):
        objective(batch)
    with torch.no_grad():
        assert objective(batch)["detached"] > 0


def test_a_loss_of_zero_can_have_no_gradient(batch):
    assert Objective(network(), [Detached(0.0)])(batch)["detached"] == 0


def test_losses_of_a_frozen_network_can_have_no_gradient(batch):
    assert Objective(network().requires_grad_(requires_grad=False))(batch)["labels"] > 0


class OfLayer(LossTerm):
    name = "of_layer"

    def forward(self, batch, student, teacher):
        return student.layers["0"].mean()


def test_the_error_for_a_layer_that_was_not_requested_names_both_arguments(batch):
    with pytest.raises(InputError, match=r"layer '0' was not requested; requested: 1. .*to Attachment.*to Objective"):
        Objective(network(), [OfLayer()], layers=[("1", "1")])(batch)


def test_a_pair_of_images_and_targets_is_accepted_as_a_batch(batch):
    objective = Objective(network().eval()).eval()
    assert torch.equal(objective((batch.images, batch.targets))["labels"], objective(batch)["labels"])
    with pytest.raises(
        InputError, match=r"a batch is of type Tensor. Pass tersor.data.batch.Batch\(images, targets\), or a tuple"
    ):
        objective(batch.images)


class Compared(LossTerm):
    name = "compared"

    def forward(self, batch, student, teacher):
        return (student.logits - teacher.logits).square().mean()


def test_a_teacher_missing_only_in_the_objective_is_named_in_the_error(batch):
    chained = Compared()
    chained.of_method, chained.had_teacher = "my:Method", True
    for term in (chained, OutputDistance(1.0)):
        with pytest.raises(InputError, match=r"There is no teacher. Pass teacher=\.\.\. to Objective\.$"):
            Objective(network(), [term])(batch)


class OfStem(OfLayer):
    name = "of_stem"

    def forward(self, batch, student, teacher):
        return student.layers["0"].square().mean()


def test_the_loss_of_a_frozen_layer_raises_unless_another_loss_has_a_gradient(batch):
    model = network()
    stem = next(iter(model.children()))
    stem.requires_grad_(requires_grad=False)
    teacher = copy.deepcopy(model)
    assert Objective(model, [OfStem()], teacher, layers=[("0", "0")])(batch)["of_stem"] > 0
    with pytest.raises(InputError, match="the loss of_stem has no gradient"):
        Objective(model, [OfStem()], teacher, label_weight=0.0, layers=[("0", "0")])(batch)
