from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tersor.graph.batchnorm import freezable
from tersor.graph.plain_modules import is_plain
from tersor.pruning.mask import Mask


class Named(nn.Conv2d):
    """A subclass that changes nothing."""


class Doubles(nn.Linear):
    def forward(self, values):
        return 2 * super().forward(values)


class Standardizes(nn.Conv2d):
    def _conv_forward(self, values, weight, bias):
        return super()._conv_forward(values, weight - weight.mean(), bias)


class Computed(nn.Linear):
    @property
    def weight(self):
        return self.raw * 2

    @weight.setter
    def weight(self, value):
        self.raw = value


class Calls(nn.ReLU):
    def __call__(self, values):
        return super().__call__(values) + 1


def patched():
    layer = nn.Linear(3, 3)
    layer.forward = types.MethodType(lambda _self, values: values, layer)
    return layer


def hooked(kind):
    layer = nn.BatchNorm2d(3)
    getattr(layer, f"register_forward_{kind}")(lambda *_: None)
    return layer


def masked():
    layer = nn.Conv2d(3, 3, 1)
    parametrize.register_parametrization(layer, "weight", Mask(layer.weight.shape))
    return layer


PLAIN = {
    "a convolution": lambda: nn.Conv2d(3, 3, 1),
    "a subclass by name alone": lambda: Named(3, 3, 1),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(3),
    "one that can be frozen": lambda: freezable(nn.BatchNorm2d(3)),
    "a mask on the weight": masked,
    "weight_norm as a parametrization": lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
}
OTHERS = {
    "a forward of the class": lambda: Doubles(3, 3),
    "a _conv_forward of the class": lambda: Standardizes(3, 3, 1),
    "a weight that is computed": lambda: Computed(3, 3),
    "a call of the class": Calls,
    "a forward of the instance": patched,
    "a forward hook": lambda: hooked("hook"),
    "a forward pre-hook": lambda: hooked("pre_hook"),
    "torch.nn.utils.prune": lambda: prune.l1_unstructured(nn.Linear(3, 3), "weight", 2),
    "a parametrized subclass": lambda: parametrizations.weight_norm(Doubles(3, 3)),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_modules_with_standard_behavior_are_plain(kind):
    torch.manual_seed(0)
    assert is_plain(PLAIN[kind]())


@pytest.mark.parametrize("kind", OTHERS)
def test_modules_with_custom_behavior_are_not_plain(kind):
    assert not is_plain(OTHERS[kind]())
