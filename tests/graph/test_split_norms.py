from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from tersor.graph.batchnorm import make_freezable
from tersor.graph.capture import capture


class Behind(nn.BatchNorm2d):
    """Its child computes before the normalisation, so that it cannot be split."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, values):
        return super().forward(self.act(values))


class Childless(nn.BatchNorm2d):
    def forward(self, values):
        return F.silu(super().forward(values))


class Checked(nn.BatchNorm2d):
    """A forward of its own that computes what torch's does."""

    def forward(self, values):
        if values.ndim != 4:
            raise ValueError
        return super().forward(values)


class Frozen(BatchNormAct2d):
    """Always in eval."""

    def train(self, mode=True):
        return super().train(False)


class InTraining(BatchNormAct2d):
    """Another forward in training alone."""

    def forward(self, values):
        return 2 * super().forward(values) if self.training else super().forward(values)


def network(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 4, 1))
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    if norm.running_var is not None:
        norm.running_var.uniform_(0.5, 2)
    return model.eval()


IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
SPLIT = {
    "SiLU": lambda: BatchNormAct2d(6, act_layer=nn.SiLU),
    "ReLU in place": lambda: BatchNormAct2d(6, act_layer=nn.ReLU, act_kwargs={"inplace": True}),
    "a slope that is learned": lambda: BatchNormAct2d(6, act_layer=nn.PReLU),
    "no activation": lambda: BatchNormAct2d(6, apply_act=False),
    "dropout too": lambda: BatchNormAct2d(6, act_layer=nn.ReLU, drop_layer=nn.Dropout),
    "of several processes": lambda: convert_sync_batchnorm(BatchNormAct2d(6, act_layer=nn.SiLU)),
    "a forward that only checks": lambda: Checked(6),
}
WHOLE = {
    "its child comes before": lambda: Behind(6),
    "its activation is no child": lambda: Childless(6),
    "always in eval": lambda: Frozen(6),
    "other in training": lambda: InTraining(6),
    "without statistics": lambda: BatchNormAct2d(6, track_running_stats=False),
}


@pytest.mark.parametrize("kind", SPLIT | WHOLE)
def test_it_computes_the_same_over_the_same_tensors(kind):
    model = network((SPLIT | WHOLE)[kind]())
    graph = capture(model)
    assert (type(graph.get_submodule("1")) in (nn.BatchNorm2d, nn.SyncBatchNorm)) == (kind in SPLIT)
    assert torch.equal(graph(IMAGES), model(IMAGES))
    assert graph.state_dict().keys() == model.state_dict().keys()
    assert {id(each) for each in graph.parameters()} == {id(each) for each in model.parameters()}


@pytest.mark.parametrize("kind", SPLIT | WHOLE)
def test_it_trains_the_same(kind):
    model = network((SPLIT | WHOLE)[kind]()).train()
    graph = capture(copy.deepcopy(model))
    answers = []
    for each in (model, graph):
        torch.manual_seed(1)
        answers.append(each(IMAGES))
    torch.testing.assert_close(*answers)
    torch.testing.assert_close(graph.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", ["its child comes before", "its activation is no child"])
def test_an_unsplit_norm_is_freezable_and_keeps_its_forward(kind):
    model = network(WHOLE[kind]())
    expected = model(IMAGES)
    (norm,) = make_freezable(model)
    norm.freeze()
    assert torch.equal(model.train()(IMAGES), expected)


def test_layers_and_the_users_network():
    model = network(SPLIT["SiLU"]())
    norm, parts = model[1], dict(vars(model[1]))
    graph = capture(model)
    assert graph.meta["layers"]["1"] == "_1_act"
    assert model[1] is norm
    assert type(norm) is BatchNormAct2d
    assert vars(norm) == parts
    state = torch.get_rng_state()
    capture(model)
    assert torch.equal(torch.get_rng_state(), state), "no random number is drawn"
