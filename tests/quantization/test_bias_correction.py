from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor.core.target import Target
from tersor.data.network_inputs import TensorInputs
from tersor.graph.capture import capture
from tersor.methods.ptq import PTQ
from tersor.models import build
from tersor.quantization import bias_correction
from tersor.quantization.bias_correction import batch_of, correct, moments
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.training.context import AttachContext


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class All(nn.Module):
    """A layer of every kind: with BatchNorm, bias, both, or neither; called twice; over positions."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv4 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.positions = nn.Linear(8, 8)
        self.fc, self.bn3 = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.linear = nn.Linear(8, 5)
        for norm in (self.bn1, self.bn2, self.bn3):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.1, 1)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        x = F.relu(self.twice(F.relu(self.twice(x))))
        x = F.relu(self.positions(x.flatten(2).transpose(1, 2)))
        return self.linear(F.relu(self.bn3(self.fc(x.mean(1)))))


LAYERS = {"conv1": "bn1", "conv2": "bn2", "conv3": "conv3", "positions": "positions", "fc": "bn3", "linear": "linear"}
"""Corrected layers, and the modules whose output means are corrected."""


def images(count=48, seed=1):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + 0.3


def rounded(model, bits=3, x=None):
    corrections = {"bias_correction": False, "variance_correction": False}
    attached = PTQ(bits=bits, first_last_bits=bits, activation_bits=6, **corrections).attach(
        model.eval(), AttachContext(data=[images() if x is None else x], target=Target(cpu="vnni"))
    )
    attached.begin()
    return attached.model


def rounding(graph, *, on):
    for each in graph.modules():
        if isinstance(each, FakeQuantize):
            each.enabled = on


def channel_means(graph, x, names):
    """The channel means of the given modules, over images and positions, in double precision."""
    found = {}

    def look(name, values):
        values = values.detach().double()
        found[name] = values.mean((0, 2, 3)) if values.ndim == 4 else values.flatten(0, -2).mean(0)

    hooks = [
        graph.get_submodule(name).register_forward_hook(lambda *call, name=name: look(name, call[-1])) for name in names
    ]
    graph(x)
    for hook in hooks:
        hook.remove()
    return found


def corrected(model, bits=3):
    graph = rounded(model, bits)
    rounding(graph, on=False)
    before = moments(graph, images())
    exact = channel_means(graph, images(), LAYERS.values())
    rounding(graph, on=True)
    shifted = channel_means(graph, images(), LAYERS.values())
    correct(graph, images(), before)
    return graph, before, exact, shifted


def test_corrected_means_equal_those_of_the_float_network():
    graph, before, exact, shifted = corrected(All())
    found = channel_means(graph, images(), LAYERS.values())
    assert before.keys() == LAYERS.keys()
    for name in LAYERS.values():
        assert (shifted[name] - exact[name]).abs().max() > 1e-3, "there was something to correct"
        torch.testing.assert_close(found[name], exact[name], rtol=0, atol=2e-6)


def test_only_biases_and_running_means_change():
    model = All()
    before = copy.deepcopy(model.state_dict())
    graph = corrected(model)[0]
    found = {key.replace("parametrizations.weight.original", "weight"): v for key, v in graph.state_dict().items()}
    changed = {key for key, value in before.items() if not torch.equal(found[key], value)}
    assert changed == {
        *("bn1.running_mean", "bn2.running_mean", "bn3.running_mean"),
        *("conv3.bias", "positions.bias", "linear.bias"),
    }


def test_correcting_again_changes_nothing_and_the_float_network_is_restored():
    model = All().eval()
    outputs, state = model(images()), copy.deepcopy(model.state_dict())
    graph, before, *_ = corrected(model)
    rounded_answers = graph(images())
    correct(graph, images(), before)
    torch.testing.assert_close(graph(images()), rounded_answers, rtol=0, atol=1e-5)
    rounding(graph, on=False)
    assert (graph(images()) - outputs).abs().max() > 1e-2
    correct(graph, images(), before)
    torch.testing.assert_close(graph(images()), outputs, rtol=0, atol=1e-5)
    torch.testing.assert_close(graph.linear.bias, state["linear.bias"], rtol=0, atol=1e-5)


class Positions(nn.Module):
    """BatchNorm1d of (N, L, C) normalizes the L positions, here as many as channels."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.linear = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.linear(self.norm(self.embed(x[:, 0])))


def test_a_layer_before_a_batchnorm_over_positions_is_corrected():
    graph, found = capture(Positions().eval(), images()), []  # without a quantizer between the two
    graph.norm.register_forward_hook(lambda *call: found.append(call[-1].mean((0, 2))))
    before = moments(graph, images())
    graph.embed.weight.data.copy_(graph.embed.weight * 4).round_().div_(4)
    graph(images())
    assert (found.pop() - found[0]).abs().max() > 1e-3, "there is something to correct"
    correct(graph, images(), before)
    graph(images())
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=2e-6)
    assert (found[1] - found[0]).abs().max() < 1e-5, "corrected before it is normalised"


def test_a_layer_before_a_batchnorm_over_positions_is_corrected_if_its_output_is_quantized():
    graph = rounded(Positions())
    assert "quantizers.embed" in dict(graph.named_modules()), "onnxruntime cannot fold this BatchNorm"
    rounding(graph, on=False)
    before, exact = moments(graph, images()), channel_means(graph, images(), ["embed", "linear"])
    rounding(graph, on=True)
    correct(graph, images(), before)
    found = channel_means(graph, images(), ["embed", "linear"])
    for name, means in exact.items():
        torch.testing.assert_close(found[name], means, rtol=0, atol=2e-6)


class Shares(All):
    """A BatchNorm after two layers, one of which has a bias."""

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(F.relu(self.bn1(self.conv2(x))).mean((2, 3)))


def test_a_batchnorm_shared_by_two_layers_is_not_corrected():
    graph = capture(Shares().eval(), images())
    before = copy.deepcopy(graph.bn1.state_dict())
    assert moments(graph, images()).keys() == {"conv2", "linear"}
    correct(graph, images(), moments(graph, images() + 1))
    assert all(torch.equal(value, before[key]) for key, value in graph.bn1.state_dict().items())


class Doubled(nn.Linear):
    """Has its own forward: the graph contains a linear layer and a multiplication after it."""

    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias)


def test_the_means_of_a_layer_with_its_own_forward_are_corrected():
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), Doubled(4, 5))
    graph = rounded(model)
    rounding(graph, on=False)
    before, exact = moments(graph, images()), channel_means(graph, images(), ["2"])["2"]
    assert before.keys() == {"0", "2"}
    rounding(graph, on=True)
    shifted = channel_means(graph, images(), ["2"])["2"]
    assert (shifted - exact).abs().max() > 1e-3, "there was something to correct"
    correct(graph, images(), before)
    torch.testing.assert_close(channel_means(graph, images(), ["2"])["2"], exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"per_channel": False}, {"symmetric": False}], ids=str)
def test_bias_correction_reduces_the_error_of_a_residual_network(options):
    model = build("resnet20", 10)
    for _ in range(3):  # statistics that differ from the initial ones
        model.train()(images(64, 9))
    model.eval()
    unseen = images(64, seed=7)
    with torch.no_grad():
        exact = model(unseen)
        errors = []
        for corrects in (False, True):
            attached = PTQ(bits=3, bias_correction=corrects, variance_correction=False, **options).attach(
                copy.deepcopy(model), AttachContext(data=[images(64)], target=Target(cpu="vnni"))
            )
            attached.begin()
            errors.append((attached.model(unseen) - exact).square().mean().item())
    assert errors[1] < 0.9 * errors[0]


def test_the_batch_is_not_larger_than_needed(monkeypatch):
    given = [images(4, 1), images(4, 2), images(4, 3)]
    assert torch.equal(batch_of(given), torch.cat(given))
    monkeypatch.setattr(bias_correction, "_POSITIONS", 6 * 64)
    assert torch.equal(batch_of(given), torch.cat(given)[:6])
    monkeypatch.setattr(bias_correction, "_POSITIONS", 4 * 64)
    assert torch.equal(batch_of(each for each in given), given[0])
    monkeypatch.setattr(bias_correction, "_POSITIONS", 1)
    assert torch.equal(batch_of(given), given[0])
    assert len(batch_of([images(20)])) == 16
    monkeypatch.setattr(bias_correction, "_LEAST_IMAGES", 1)
    assert torch.equal(batch_of(given), given[0][:1])


def test_the_size_of_the_largest_input_limits_the_batch(monkeypatch):
    monkeypatch.setattr(bias_correction, "_POSITIONS", 2 * 64)
    monkeypatch.setattr(bias_correction, "_LEAST_IMAGES", 1)
    for small in (torch.zeros(4), torch.zeros(4, 8)):
        assert len(batch_of([TensorInputs((small, images(4)))])) == 2


def test_data_that_can_be_read_only_once_is_enough():
    model = All().eval()
    once, again = (
        PTQ(bias_correction=True).attach(copy.deepcopy(model), AttachContext(data=data))
        for data in (iter([images()]), [images()])
    )
    once.begin()
    again.begin()
    assert torch.equal(once.model(images()), again.model(images()))


def spreads_behind_norms(graph, x):
    seen = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, given, name=name: seen.update({name: given}))
        for name, module in graph.named_modules()
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)
    ]
    with torch.no_grad():
        graph(x)
    for hook in hooks:
        hook.remove()
    return {
        name: (given.movedim(1, -1).flatten(0, -2).std(0), given.movedim(1, -1).flatten(0, -2).mean(0))
        for name, given in seen.items()
    }


def test_for_a_batchnorm_standard_deviations_are_corrected_too():
    model = All().eval()
    model.bn2.weight.data[0] = 0  # a dead channel stays dead
    graph = capture(copy.deepcopy(model), images())
    before, expected = moments(graph, images()), spreads_behind_norms(graph, images())
    with torch.no_grad():  # as if clipped: the outputs of all layers are smaller
        for layer in (graph.conv1, graph.conv2, graph.fc):
            layer.weight.mul_(0.6)
        graph.conv2.weight[1] = 0
    shrunk = spreads_behind_norms(graph, images())
    correct(graph, images(), before, variances=True)
    for name, (spread, mean) in spreads_behind_norms(graph, images()).items():
        alive = torch.ones(8, dtype=torch.bool)
        alive[:2] = name != "bn2"
        assert torch.allclose(spread[alive], expected[name][0][alive], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(spread[alive], shrunk[name][0][alive], rtol=0.1)
        assert torch.allclose(mean[alive], expected[name][1][alive], atol=1e-3)
        assert torch.isfinite(spread).all()


def test_variance_correction_reduces_the_error_with_3_bits():
    def error(**options):
        model = build("resnet20", 10).eval()
        torch.manual_seed(1)
        x = torch.randn(64, 3, 16, 16)
        truth = capture(model, x)(x).detach()
        found = PTQ(bits=3, weight_range="mse", **options).attach(copy.deepcopy(model), AttachContext(data=[x]))
        found.begin()
        return float((found.model(x).detach() - truth).square().mean())

    assert error(variance_correction=True) < 0.5 * error(bias_correction=True, variance_correction=False)
