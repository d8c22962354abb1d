from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tersor.core.target import Target
from tersor.graph.capture import capture
from tersor.methods.ptq import PTQ
from tersor.quantization.output_error import input_energies
from tersor.quantization.quantizer_options import Precision
from tersor.quantization.quantizers import insert_quantizers
from tersor.training.context import AttachContext

VNNI = Target(cpu="vnni")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(count=8):
    return torch.randn(count, 4, 6, 6, generator=torch.Generator().manual_seed(1)) + 0.5


def grouped():
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(24, 3)
    ).eval()


def test_input_energies_are_the_mean_squares_of_the_input_channels():
    x, graph = images(), capture(grouped(), images())
    quantizers = insert_quantizers(graph, Precision(), exclude=(), target=VNNI, method="ptq")
    found = input_energies(quantizers, x)
    assert found["0"].tolist() == pytest.approx([float((x[:, c] ** 2).mean()) for c in range(4)], rel=1e-5)
    inside = graph.get_submodule("0")(x).relu().detach()
    assert found["2"].tolist() == pytest.approx([float((inside[:, c] ** 2).mean()) for c in range(6)], rel=1e-5)
    assert found["4"].shape == (24,)


def with_an_outlier():
    """A network with a weight 200 times larger than all others, whose input channel is always zero."""
    model = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 3), nn.Flatten(), nn.Linear(96, 3))
    nn.init.constant_(model[0].bias, 0.1)
    nn.init.constant_(model[0].bias[2], -100.0)
    model[2].weight.data[:, 2, 1, 1] = 200 * model[2].weight.data.abs().max()
    return model.eval()


@torch.no_grad()
def error(weight_range, **options):
    model = with_an_outlier()
    before = model(images())
    attached = PTQ(weight_range=weight_range, **options).attach(
        copy.deepcopy(model), AttachContext(data=[images()], target=VNNI)
    )
    attached.begin()
    return float((attached.model(images()) - before).square().mean() / before.square().mean())


@pytest.mark.parametrize("options", [{}, {"per_channel": False}], ids=str)
def test_a_weight_whose_input_is_always_zero_does_not_widen_the_range(options):
    assert error("minmax", **options) > 1e-2
    assert error("output_mse", **options) < 1e-3


@torch.no_grad()
def test_without_outliers_output_mse_has_a_smaller_error_than_minmax():
    x, model = images(64), grouped()
    before = model(x)
    errors = {}
    for kind in ("minmax", "output_mse"):
        attached = PTQ(bits=4, weight_range=kind, activation_bits=8).attach(
            copy.deepcopy(model), AttachContext(data=[x], target=VNNI)
        )
        attached.begin()
        errors[kind] = float((attached.model(x) - before).square().mean())
    assert errors["output_mse"] < errors["minmax"]
