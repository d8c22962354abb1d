from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from tersor.core.errors import CompressionWarning, InputError
from tersor.methods.dpf import DPF
from tersor.methods.fitnet import FitNet
from tersor.methods.group_lasso import GroupLasso
from tersor.methods.lsq import LSQ
from tersor.methods.psgd import PSGD
from tersor.methods.qat import QAT
from tersor.methods.rigl import RigL
from tersor.methods.soft_targets import SoftTargets
from tersor.models import build
from tersor.training.attachment import Attachment, Chain, without_loss
from tersor.training.context import AttachContext
from tersor.training.loss_warmup import WarmupAttachment, WarmupLossTerm
from tersor.training.objective import LossTerm


class Recorder(Attachment):
    """Records calls with the current weight."""

    def __init__(self, model, calls, name, label_weight=1.0):
        super().__init__(model, [LossTerm()], label_weight)
        self.calls = calls
        self.name = name

    def begin(self):
        self.calls.append((self.name, "begin"))

    def before_step(self, step, optimizer):
        self.calls.append((self.name, "before", step, self.model.weight.item()))

    def after_step(self, step, optimizer):
        self.calls.append((self.name, "after", step, self.model.weight.item()))

    def finish(self):
        self.calls.append((self.name, "finish"))


def setting():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 5.0)
    return model, torch.optim.SGD(model.parameters(), lr=1.0)


def step(model, optimizer):
    optimizer.zero_grad()
    model.weight.sum().backward()  # gradient 1: every step subtracts 1
    optimizer.step()


def test_hooks_are_called_before_and_after_the_step():
    model, optimizer = setting()
    calls = []
    Recorder(model, calls, "a").bind(optimizer, start=7)
    step(model, optimizer)
    step(model, optimizer)
    assert calls == [("a", "before", 7, 5), ("a", "after", 7, 4), ("a", "before", 8, 4), ("a", "after", 8, 3)]


def test_remove_removes_all_hooks():
    model, optimizer = setting()
    calls = []
    handle = Recorder(model, calls, "a").bind(optimizer)
    other = Recorder(model, calls, "b").bind(optimizer)
    handle.remove()
    handle.remove()
    step(model, optimizer)
    assert [call[0] for call in calls] == ["b", "b"]
    other.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_chain_keeps_the_order_and_multiplies_label_weights():
    model, optimizer = setting()
    calls = []
    parts = [Recorder(model, calls, "a", 0.5), Recorder(model, calls, "b", 0.25)]
    chain = Chain(model, parts, ["m:A", "m:B"])
    assert chain.label_weight == 0.125
    assert chain.terms == (*parts[0].terms, *parts[1].terms)
    chain.begin()
    assert calls == [("a", "begin"), ("b", "begin")]
    calls.clear()
    chain.bind(optimizer)
    step(model, optimizer)
    chain.finish()
    assert [call[:2] for call in calls] == [
        ("a", "before"),
        ("b", "before"),
        ("a", "after"),
        ("b", "after"),
        ("a", "finish"),
        ("b", "finish"),
    ]


class Scheduled(Attachment):
    scheduled_steps = 3


def scheduled_in_a_chain(model):
    return Chain(model, [Scheduled(model), Attachment(model)], ["m:A", "m:B"])


@pytest.mark.parametrize("made", [Scheduled, scheduled_in_a_chain])
@pytest.mark.parametrize(
    ("start", "steps", "expected"),
    [
        (None, 0, r"Scheduled: finish was called after 0 optimizer steps, .* has 3. .* call bind\(optimizer\) before"),
        (0, 2, r"after 2 optimizer steps, but its schedule has 3. Pass AttachContext\(steps=...\) with the number"),
        (0, 3, None),
        (3, 0, None),
    ],
)
def test_an_incomplete_schedule_causes_a_warning(made, start, steps, expected):
    model, optimizer = setting()
    attached = made(model)
    if start is not None:
        attached.bind(optimizer, start=start)
    for _ in range(steps):
        step(model, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attached.finish()
    if expected is None:
        assert not caught
        return
    assert [each.category for each in caught] == [CompressionWarning]
    with pytest.raises(CompressionWarning, match=expected):
        raise caught[0].message


@pytest.mark.parametrize("method", [QAT(), LSQ(), PSGD(), GroupLasso(), DPF(), RigL(), SoftTargets(), FitNet()])
def test_finish_warns_without_steps_unless_the_method_does_not_need_bind(method):
    """As described in docs/how-to/own-loop.md: losses without a schedule are not checked."""
    data, networks = [torch.randn(4, 3, 8, 8)], [build("resnet20", 10) for _ in range(2)]
    for bound in (False, True):
        student = copy.deepcopy(networks[0])
        attached = method.attach(student, AttachContext(data=data, teacher=networks[1], steps=1, steps_per_epoch=1))
        attached.begin()
        optimizer = torch.optim.SGD(attached.model.parameters(), lr=0.0)
        if bound:
            attached.bind(optimizer)
            attached.model(data[0]).sum().backward()
            optimizer.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            attached.finish()
        expected = (
            [] if bound or attached.terms else [f"{type(attached).__name__}: finish was called after 0 optimizer"]
        )
        assert [str(each.message)[: len(text)] for each, text in zip(caught, expected, strict=True)] == expected
        assert all(str(each.message).endswith(" call bind(optimizer) before the first step.") for each in caught)


def test_an_optimizer_of_another_network_raises():
    model, _ = setting()
    _, other = setting()
    with pytest.raises(InputError, match=r"the SGD has no parameter of the attached network. Create it with attached"):
        Attachment(model).bind(other)


def test_an_empty_chain_has_no_terms():
    model, _ = setting()
    chain = Chain(model, [], [])
    assert (chain.terms, chain.label_weight) == ((), 1.0)


def test_the_weight_of_a_term_rises_linearly_to_1_in_the_warmup():
    term = WarmupLossTerm()
    attached = WarmupAttachment(nn.Linear(1, 1), term, steps=4, label_weight=0.5, layers=[("a", "b")])
    seen = [term.warmup.item()]
    for number in range(6):
        attached.after_step(number, None)
        seen.append(term.warmup.item())
    assert seen == [0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert (attached.label_weight, attached.layers) == (0.5, (("a", "b"),))
    WarmupAttachment(nn.Linear(1, 1), term, steps=0, label_weight=1.0)
    assert term.warmup == 1


def test_without_its_own_loss_a_method_has_label_weight_0_or_1():
    model = nn.Linear(1, 1)
    assert [without_loss(model, weight).label_weight for weight in (0.0, 0.3, 2.0)] == [0, 1, 1]


def test_tensors_in_metrics_are_converted_to_numbers():
    class Counting(Attachment):
        @property
        def metrics(self):
            return {"share": torch.tensor(0.5), "by_layer": torch.tensor([1, 2]), "kind": "x"}

    model = nn.Linear(1, 1)
    assert Chain(model, [Counting(model)], ["counting"]).metrics == {"share": 0.5, "by_layer": [1, 2], "kind": "x"}


class Measured(Attachment):
    @property
    def metrics(self):
        return {"own": 1, "losses": {}}


def test_a_metric_with_a_reserved_name_raises():
    model, _ = setting()
    with pytest.raises(InputError, match=r"Measured.metrics has the name 'losses', which numbers.json uses"):
        Chain(model, [Measured(model)], ["m:A"]).metrics  # noqa: B018


class OwnSteps(Scheduled):
    def after_step(self, step, optimizer):
        self.steps = step + 1


@pytest.mark.parametrize("chained", [False, True])
def test_steps_are_counted_even_if_a_class_overrides_after_step(chained):
    model, optimizer = setting()
    own = OwnSteps(model)
    own.parts = ["a name of the user's class"]
    attached = Chain(model, [own], ["m:A"]) if chained else own
    attached.bind(optimizer)
    for _ in range(3):
        step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached.finish()
    assert own.completed == own.steps == 3
