"""Exceptions in a user's method: one error message with file and line, before the training if possible."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import nn

from tersor import cli
from tersor.core.errors import InputError
from tersor.core.progress import NullProgress
from tersor.data.batch import Batch
from tersor.methods.dcil import DCIL
from tersor.methods.dpf import DPF
from tersor.methods.lsq import LSQ
from tersor.methods.qat import QAT
from tersor.methods.rigl import RigL
from tersor.methods.soft_targets import SoftTargets
from tersor.pipeline.dry_run import explain
from tersor.recipe import parse
from tersor.training.attachment import Attachment
from tersor.training.context import AttachContext
from tersor.training.method import PLAIN_VALUES, chain
from tersor.training.objective import LossTerm, Objective

RECIPE = """\
model: {name: "test_failing_methods:network"}
data: {name: digits, limit: 64}
stages:
  - {name: first, steps: 1, batch_size: 32, methods: ["test_failing_methods:METHOD"]}
"""
HERE = "test_failing_methods"


def network(num_classes: int = 10):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, num_classes))


def synchronized(num_classes: int = 10):
    return nn.SyncBatchNorm.convert_sync_batchnorm(network(num_classes))


def pooled(num_classes: int = 10):
    layers = nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, num_classes)
    return nn.Sequential(nn.Conv2d(3, 3, 3), *layers)


class Broken(Attachment):
    def after_step(self, step, optimizer):
        self.absent.append(step)


class Hint(LossTerm):
    name = "hint"

    def forward(self, batch, student, teacher):
        return F.mse_loss(student.logits, teacher.logits)


class ManyImages(LossTerm):
    name = "many_images"

    def forward(self, batch, student, teacher):
        return student.logits.topk(20, dim=0).values.mean()


@dataclass(frozen=True, config=PLAIN_VALUES)
class InAttach:
    def attach(self, model, context):
        return Attachment(model, [Hint()], label_weight=1 / context.absent)


@dataclass(frozen=True, config=PLAIN_VALUES)
class InStep:
    def attach(self, model, context):
        return Broken(model)


@dataclass(frozen=True, config=PLAIN_VALUES)
class WithoutTeacher:
    def attach(self, model, context):
        return Attachment(model, [Hint()])


@dataclass(frozen=True, config=PLAIN_VALUES)
class TeacherInAttach:
    def attach(self, model, context):
        return Attachment(context.teacher.eval())


@dataclass(frozen=True, config=PLAIN_VALUES)
class NeedsTwenty:
    needs_steps: ClassVar[bool] = True

    def attach(self, model, context):
        return Attachment(model, [ManyImages()])


class Prepared(Attachment):
    def begin(self):
        self.terms[0].center = torch.zeros(10)


class Centered(LossTerm):
    name = "centered"

    def forward(self, batch, student, teacher):
        return F.mse_loss(student.logits.mean(0), self.center)


@dataclass(frozen=True, config=PLAIN_VALUES)
class PreparedByBegin:
    needs_steps: ClassVar[bool] = True

    def attach(self, model, context):
        return Prepared(model, [Centered()])


class NoInit(LossTerm):
    name = "no_init"

    def __init__(self):
        self.weight = 1.0


class Unprepared(Attachment):
    def __init__(self, model):
        self.model = model


@dataclass(frozen=True, config=PLAIN_VALUES)
class TermWithoutInit:
    def attach(self, model, context):
        return Attachment(model, [NoInit()])


@dataclass(frozen=True, config=PLAIN_VALUES)
class AttachmentWithoutInit:
    def attach(self, model, context):
        return Unprepared(model)


class OfLogits(LossTerm):
    name = "of_logits"

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, batch, student, teacher):
        return self.function(student.logits).mean()


@dataclass(frozen=True, config=PLAIN_VALUES)
class NotFinite:
    needs_steps: ClassVar[bool] = True

    def attach(self, model, context):
        return Attachment(model, [OfLogits(lambda logits: logits.new_zeros(()).log() * logits)])


@dataclass(frozen=True, config=PLAIN_VALUES)
class NoGradient:
    needs_steps: ClassVar[bool] = True

    def attach(self, model, context):
        return Attachment(model, [OfLogits(torch.Tensor.detach)])


def absent_hook(module, inputs):
    return (inputs[0] / module.missing,)


class Hooked(Attachment):
    def begin(self):
        next(self.model.children()).register_forward_pre_hook(absent_hook)


@dataclass(frozen=True, config=PLAIN_VALUES)
class InHook:
    needs_steps: ClassVar[bool] = True

    def attach(self, model, context):
        return Hooked(model)


def line(code: str) -> int:
    """The number of the line in this file that equals `code`."""
    return [each.strip() for each in Path(__file__).read_text().splitlines()].index(code) + 1


IN_ATTACH = "return Attachment(model, [Hint()], label_weight=1 / context.absent)"
IN_LOSS = "return F.mse_loss(student.logits, teacher.logits)"
MESSAGES = {
    "InAttach": f"method '{HERE}:InAttach': attach failed in {__file__}, line {line(IN_ATTACH)} ({IN_ATTACH}): "
    "AttributeError: 'AttachContext' object has no attribute 'absent'",
    "InStep": f"method '{HERE}:InStep': after_step failed in {__file__}, line {line('self.absent.append(step)')} "
    "(self.absent.append(step)): AttributeError: 'Broken' object has no attribute 'absent'",
    "InHook": f"method '{HERE}:InHook': training failed in {__file__}, line "
    f"{line('return (inputs[0] / module.missing,)')} (return (inputs[0] / module.missing,)): AttributeError: 'Conv2d' "
    "object has no attribute 'missing'",
    "WithoutTeacher": f"the loss hint of method '{HERE}:WithoutTeacher' failed in {__file__}, line {line(IN_LOSS)} "
    f"({IN_LOSS}): AttributeError: 'NoneType' object has no attribute 'logits'. There is no teacher. Write one in the "
    "recipe, and set needs_teacher: ClassVar[bool] = True in class WithoutTeacher, so that a recipe without one is "
    "refused.",
    "TermWithoutInit": f"method '{HERE}:TermWithoutInit': NoInit.__init__ does not initialize its base class: call "
    "super().__init__() first.",
    "AttachmentWithoutInit": f"method '{HERE}:AttachmentWithoutInit': Unprepared.__init__ does not initialize its base "
    "class: call super().__init__() first.",
}


@pytest.mark.parametrize("method", MESSAGES)
def test_the_command_line_prints_one_message(method, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("METHOD", method))
    monkeypatch.setattr(sys, "argv", ["tersor", "run", "recipe.yaml"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    error = capfd.readouterr().err
    assert f"error: {MESSAGES[method]}\n" in error
    assert "Traceback" not in error


def test_the_exception_of_the_method_is_the_cause():
    attached = chain([InStep()], network(), AttachContext())
    with pytest.raises(InputError) as raised:
        attached.after_step(0, torch.optim.SGD(attached.model.parameters()))
    assert isinstance(raised.value.__cause__, AttributeError)
    assert raised.value.__cause__.obj is attached.parts[0]


def test_a_missing_teacher_in_attach_is_named():
    with pytest.raises(InputError, match=r"needs_teacher: ClassVar\[bool\] = True in class TeacherInAttach"):
        chain([TeacherInAttach()], network(), AttachContext())


def test_a_missing_teacher_in_a_users_training_loop_is_named():
    attached = WithoutTeacher().attach(network(), AttachContext())
    with pytest.raises(
        InputError, match=r"the loss hint failed .* no attribute 'logits'. There is no teacher. Pass teacher="
    ):
        Objective(attached.model, attached.terms)(Batch(torch.randn(2, 3, 8, 8), torch.tensor([0, 1])))


@pytest.mark.parametrize("method", [QAT(), LSQ(), DPF(), RigL(), DCIL()], ids=lambda each: type(each).__name__)
def test_a_method_without_steps_raises_in_a_users_training_loop(method):
    with pytest.raises(InputError, match=r"needs training, but there are 0 steps.*AttachContext\(steps=\.\.\.\)"):
        method.attach(network(), AttachContext(data=[torch.randn(4, 3, 8, 8)]))


def test_chain_raises_if_a_requirement_of_a_method_is_not_met():
    with pytest.raises(InputError, match=r"method 'test_failing_methods:NeedsTwenty' needs training, but .* 0 steps"):
        chain([NeedsTwenty()], network(), AttachContext())
    with pytest.raises(InputError, match=r"SoftTargets' needs a teacher"):
        chain([SoftTargets()], network(), AttachContext(steps=1))


def explain_text(text: str):
    return list(explain(parse(text, "recipe.yaml"), progress=NullProgress()))


def explained(method: str):
    return explain_text(RECIPE.replace("METHOD", method))


def test_explain_finds_a_failing_loss():
    with pytest.raises(InputError, match="the loss hint of method"):
        explained("WithoutTeacher")


def test_explain_accepts_a_loss_that_needs_many_images():
    assert any("losses: labels, many_images" in each for each in explained("NeedsTwenty"))


def test_explain_computes_a_loss_that_stores_all_images():
    text = RECIPE.replace("test_failing_methods:METHOD", "crd").replace("limit: 64", "limit: 200")
    text += f'teacher: {{name: "{HERE}:network", epochs: 1}}\n'
    assert any("losses: labels, crd" in each for each in explain_text(text))


def test_explain_finds_a_batch_that_is_too_small_for_batchnorm():
    text = RECIPE.replace("METHOD", "NeedsTwenty").replace("batch_size: 32", "batch_size: 1")
    text = text.replace(":network", ":pooled")
    with pytest.raises(InputError, match="BatchNorm needs more than one value"):
        explain_text(text)


def test_a_loss_that_is_prepared_in_begin_is_not_computed_before_begin():
    assert any("losses: labels, centered" in each for each in explained("PreparedByBegin"))


def test_explain_works_with_synchronized_batchnorm():
    text = RECIPE.replace("METHOD", "NeedsTwenty").replace(":network", ":synchronized")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert any("losses: labels, many_images" in each for each in explain_text(text))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("NotFinite", "the loss 'of_logits' is nan before any update of the weights"),
        ("NoGradient", f"the loss of_logits of method '{HERE}:NoGradient' has no gradient with respect to the network"),
    ],
)
def test_explain_finds_a_loss_that_is_not_finite_or_has_no_gradient(method, message):
    with pytest.raises(InputError, match=message):
        explained(method)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (InStep(), r"an object of type InStep. Pass a list of methods: chain\(\[\.\.\.\]"),
        ([InStep], "the class InStep in the list. Pass instances"),
    ],
)
def test_chain_requires_a_list_of_instances(methods, message):
    with pytest.raises(InputError, match=message):
        chain(methods, network(), AttachContext())
