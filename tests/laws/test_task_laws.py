"""Laws for every method on a network of each task: the method works, or one error states what the task lacks."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re

import pytest
import torch
import torch.nn.functional as F
from subjects import build_method
from torch import nn
from torch.utils._pytree import tree_leaves, tree_structure

from tersor import methods as registry
from tersor import tasks
from tersor.core.errors import InputError
from tersor.data.batch import Batch
from tersor.graph.capture import capture
from tersor.graph.parametrization import strip
from tersor.tasks.task import Task
from tersor.training.context import AttachContext
from tersor.training.objective import Objective

IMAGES = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
MASKS = (IMAGES[:, 0] > 0).long() + (IMAGES[:, 1] > 1)
MASKS[:, 0] = 255  # not counted
VALUES = torch.stack([IMAGES.mean((1, 2, 3)), IMAGES.std((1, 2, 3))], 1)


class Network(nn.Module):
    """A convolution, a residual block, and the outputs required by the task `kind`."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        if kind in ("segmentation", "distance"):
            self.pixels = nn.Conv2d(8, 3, 1)
        if kind != "segmentation":
            self.values = nn.Linear(8, 2)
            self._standardize()

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.conv2(x))
        if self.kind == "segmentation":
            return self.pixels(x)
        values = self.values(x.mean((2, 3)))
        return {"values": values, "maps": [self.pixels(x)]} if self.kind == "distance" else values

    @torch.no_grad()
    def _standardize(self):
        """Give the values mean 0 and deviation 1 over the images, so that predictions differ."""
        outputs = self.eval()(IMAGES)
        values = outputs["values"] if self.kind == "distance" else outputs
        self.values.bias.sub_(values.mean(0)).div_(values.std(0))
        self.values.weight.div_(values.std(0)[:, None])


TARGETS = {
    "segmentation": MASKS,
    "regression": VALUES,
    "multilabel": VALUES.gt(VALUES.mean(0)).long(),
    "embedding": None,
    "distance": None,  # the network with several outputs
}


class Data:
    """All images in two batches, with the targets of a task or others."""

    images = IMAGES

    def __init__(self, kind, targets=None):
        self.targets = TARGETS[kind] if targets is None else targets

    def __len__(self):
        return 2

    def __iter__(self):
        for index in torch.arange(32).split(16):
            yield Batch(IMAGES[index], None if self.targets is None else self.targets[index], index)


@functools.cache
def captured(kind):
    """A student and a teacher."""
    torch.manual_seed(0)
    return tuple(capture(Network(kind).eval(), IMAGES[:2]) for _ in range(2))


def attached(method, kind, data=None):
    student, teacher = (copy.deepcopy(network) for network in captured(kind))
    context = AttachContext(data=data or Data(kind), teacher=teacher, task=tasks.build(kind), steps=4)
    return method.attach(student, context), context


def trained(method, kind):
    """The network after one step with the method."""
    attachment, context = attached(method, kind)
    attachment.begin()
    options = {"layers": attachment.layers, "label_weight": attachment.label_weight, "task": context.task}
    objective = Objective(attachment.model, attachment.terms, context.teacher, **options).train()
    optimizer = torch.optim.SGD([each for each in objective.parameters() if each.requires_grad], lr=0.01)
    handle = attachment.bind(optimizer)
    losses = objective(next(iter(context.data)))
    assert set(losses) == {"labels", *(term.name for term in attachment.terms)}
    total = torch.stack([*losses.values()]).sum()
    assert total.isfinite()
    total.backward()
    optimizer.step()
    handle.remove()
    attachment.finish()
    return attachment.model.eval()


def lacks(method, kind):
    """Whether the task lacks something that the method declares as needed."""
    no_logits = tasks.get(kind).logits is Task.logits
    return (getattr(method, "needs_logits", False) and no_logits) or (
        getattr(method, "needs_classes", False) and kind != "segmentation"
    )


@torch.no_grad()
def check_outputs(model, kind):
    """A stripped copy has the outputs of the model, in the containers of the original."""
    found, plain = model(IMAGES), strip(model)(IMAGES)
    assert tree_structure(found) == tree_structure(captured(kind)[0](IMAGES))
    for one, other in zip(tree_leaves(found), tree_leaves(plain), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", registry.names())
def test_every_method_trains_a_network_of_each_task_or_raises(name):
    """Every method trains a network of each task, or `attach` raises an error with what is missing."""
    for kind in TARGETS:
        method = build_method(name, "example")
        if hasattr(method, "iterations"):  # the length of the reconstruction does not matter here
            method = dataclasses.replace(method, iterations=2)
        if kind == "multilabel" and getattr(method, "standardize", False):
            method = build_method(name, "defaults")
        if lacks(method, kind):
            with pytest.raises(InputError, match=rf"{name} .*task {kind} has.* Write ") as refusal:
                attached(method, kind)
            assert not re.search(r"[Ww]rite \w*\b" + name, str(refusal.value))
            continue
        check_outputs(trained(method, kind), kind)


PRUNED = [
    ("channel_pruning", {"importance": "obs", "branches": 1, "round_to": 1, "keep_macs": 0.5}),
    ("channel_pruning", {"importance": "taylor", "round_to": 1, "keep_macs": 0.5}),
    ("weight_pruning", {"importance": "taylor"}),
]


@pytest.mark.parametrize(("name", "options"), PRUNED, ids=str)
def test_obs_and_taylor_importance_work_for_every_task(name, options):
    for kind in TARGETS:
        method = registry.get(name)(**options)
        if options["importance"] == "taylor" and tasks.get(kind).from_original:
            with pytest.raises(InputError, match=f"the task {kind} the loss is the distance from the original"):
                attached(method, kind)
            continue
        attachment, _ = attached(method, kind)
        attachment.begin()
        attachment.finish()
        check_outputs(attachment.model.eval(), kind)


@torch.no_grad()
def in_float(kind):
    """Targets that the float network predicts without an error; None for a task that needs none."""
    task = tasks.build(kind)
    return None if task.from_original else task.predictions(captured(kind)[0](IMAGES)).to(TARGETS[kind])


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "regression" else pytest.mark.slow) for kind in TARGETS]
)
def test_max_drop_is_in_the_metric_of_the_task(kind):
    task, targets = tasks.build(kind), in_float(kind)
    for max_drop in (1e6, 1e-6):
        method = registry.get("ptq")(bits=2, activation_bits=8, max_drop=max_drop)
        attachment, _ = attached(method, kind, Data(kind, targets))
        attachment.begin()
        with torch.no_grad():
            found, exact = (task.predictions(each(IMAGES)) for each in (attachment.model.eval(), captured(kind)[0]))
        reference = exact if targets is None else targets
        worse = task.score([(exact, reference)]) - task.score([(found, reference)])
        assert attachment.metrics["drop"] == pytest.approx(worse if task.higher_is_better else -worse, abs=1e-4)
        everything = max_drop > 1
        assert everything == (attachment.metrics["drop"] > 0.001)
        assert everything == (not attachment.metrics["left_in_float"])


def test_without_targets_max_drop_counts_changed_predictions():
    method = registry.get("ptq")(bits=2, activation_bits=8, max_drop=1e6)
    attachment, context = attached(method, "multilabel", list(IMAGES.split(16)))
    attachment.begin()
    with torch.no_grad():
        both = [context.task.predictions(each(IMAGES)) for each in (attachment.model.eval(), captured("multilabel")[0])]
    assert attachment.metrics["drop"] == pytest.approx(100 * (both[0] != both[1]).double().mean())
