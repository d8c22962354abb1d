from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from tersor.graph.parametrization import in_float32, parametrizations_of, strip
from tersor.graph.plain_network import plain_copy
from tersor.quantization.fake_quantize import FakeQuantize, weight_quantizer
from tersor.quantization.grid import Grid, affine_parameters, symmetric_scale


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(layer):
    quantizer = FakeQuantize(Grid.signed(4), channels=layer.weight.shape[0])
    quantizer.set_grid(symmetric_scale(layer.weight.detach().abs().flatten(1).amax(1), quantizer.grid))
    parametrize.register_parametrization(layer, "weight", quantizer)
    return layer


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        quantized(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), quantized(nn.Linear(4 * 36, 5))
    ).eval()


@given(st.integers(0, 2**31), st.integers(2, 8))
def test_values_are_rounded_to_the_grid(seed, bits):
    values = draw(seed, 40) * 3
    quantizer = FakeQuantize(Grid.unsigned(bits))
    scale, zero_point = affine_parameters(
        values.min() / 2, values.max() / 2, quantizer.grid
    )  # so that some are clipped
    quantizer.set_grid(scale, zero_point)
    integers = quantizer(values) / scale + zero_point
    assert len(quantizer(values).unique()) <= 2**bits
    for value, integer in zip(values.tolist(), integers.tolist(), strict=True):
        exact = value / scale.item()
        expected = min(max(round(exact) + zero_point.item(), 0), 2**bits - 1)
        near_a_tie = abs(exact % 1 - 0.5) < 1e-3
        assert integer == pytest.approx(expected, abs=1.001 if near_a_tie else 1e-3)


def test_every_channel_has_its_own_scale():
    weight = torch.tensor([[1.0, 0.26], [100.0, 26.0]])
    quantizer = FakeQuantize(Grid.signed(3), channels=2)
    quantizer.set_grid(torch.tensor([1 / 3, 100 / 3]))
    torch.testing.assert_close(quantizer(weight), torch.tensor([[1.0, 1 / 3], [100.0, 100 / 3]]))


def test_disabled_quantizers_return_their_input():
    values = draw(0, 3, 4)
    assert FakeQuantize(Grid.signed(2))(values) is values


def test_the_gradient_is_passed_through_inside_the_range_only():
    quantizer = FakeQuantize(Grid.unsigned(8))
    quantizer.set_grid(torch.tensor(0.1), torch.tensor(0))
    values = torch.tensor([-1.0, 0.04, 12.34, 25.4, 30.0], requires_grad=True)
    quantizer(values).sum().backward()
    assert values.grad.tolist() == [0, 1, 1, 1, 0]


def test_the_state_dict_contains_scale_and_enabled_flag():
    quantizer = FakeQuantize(Grid.signed(8), channels=3)
    quantizer.set_grid(torch.tensor([0.1, 0.2, 0.3]))
    fresh = FakeQuantize(Grid.signed(8), channels=3)
    fresh.load_state_dict(quantizer.state_dict())
    assert fresh.enabled
    assert torch.equal(fresh.scale, quantizer.scale)
    fresh.load_state_dict(FakeQuantize(Grid.signed(8), channels=3).state_dict())
    assert not fresh.enabled


def test_weight_quantizer_returns_the_enabled_quantizer():
    layer = nn.Linear(3, 2)
    assert weight_quantizer(layer) is None
    assert list(parametrizations_of(layer)) == []
    parametrize.register_parametrization(layer, "weight", FakeQuantize(Grid.signed(8), channels=2))
    assert weight_quantizer(layer) is None
    assert len(list(parametrizations_of(layer))) == 1
    layer.parametrizations.weight[0].set_grid(torch.ones(2))
    assert weight_quantizer(layer) is layer.parametrizations.weight[0]
    assert weight_quantizer(nn.ReLU()) is None


def test_strip_keeps_the_outputs_and_removes_all_parametrizations():
    model = network()
    images = draw(1, 2, 3, 8, 8)
    before = model(images)
    keys = set(model.state_dict())
    plain = strip(model)
    assert torch.equal(plain(images), before)
    assert not any(parametrize.is_parametrized(module) for module in plain.modules())
    assert set(plain.state_dict()) == set(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()) | {
        "4.weight",
        "4.bias",
    }
    assert type(plain[0]) is nn.Conv2d
    # the model is unchanged
    assert torch.equal(model(images), before)
    assert set(model.state_dict()) == keys
    assert parametrize.is_parametrized(model[0])
    assert type(model[0]) is not nn.Conv2d


@pytest.mark.parametrize("ready", [True, False])
def test_the_plain_copy_shares_no_tensors_with_the_model(ready):
    model = network()
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            module.enabled = ready  # a disabled quantizer returns its input tensor
    images = draw(1, 2, 3, 8, 8)
    before = model(images)
    plain = strip(model)
    with torch.no_grad():
        for tensor in plain.state_dict().values():
            tensor.zero_()
    assert torch.equal(model(images), before)
    plain(images).sum().backward()
    assert plain[0].weight.grad is not None
    assert plain[0].bias.grad is not None


def test_strip_of_a_plain_model_is_a_copy():
    model = nn.Sequential(nn.Linear(3, 2))
    plain = strip(model)
    assert plain is not model
    assert torch.equal(plain[0].weight, model[0].weight)


def test_strip_can_be_repeated_and_applied_to_a_deepcopy():
    model = network()
    images = draw(1, 2, 3, 8, 8)
    copied = copy.deepcopy(model)
    assert torch.equal(strip(strip(copied))(images), model(images))
    assert torch.equal(copied(images), model(images))


def test_strip_works_for_a_single_module_and_for_a_parametrized_module_with_children():
    layer = quantized(nn.Linear(4, 3))
    assert torch.equal(strip(layer).weight, layer.weight)
    attention = weight_norm(nn.MultiheadAttention(4, 2), "in_proj_weight")
    quantized(attention.out_proj)
    inputs = draw(0, 5, 2, 4)
    before, _ = attention(inputs, inputs, inputs)
    plain = strip(attention)
    assert torch.equal(plain(inputs, inputs, inputs)[0], before)
    assert not any(parametrize.is_parametrized(module) for module in plain.modules())


def test_a_module_that_is_used_twice_stays_shared():
    shared = quantized(nn.Linear(3, 3))
    plain = strip(nn.Sequential(shared, nn.ReLU(), shared))
    assert plain[0] is plain[2]


def test_a_network_in_another_precision_is_copied_to_float32():
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half())
    assert {each.dtype for each in in_float32(mixed).parameters()} == {torch.float32}
    assert mixed[1].weight.dtype == torch.float16
    plain = nn.Linear(2, 2)
    assert in_float32(plain) is plain


def test_a_copy_has_the_original_forward_without_the_wrapper_of_accelerate():
    model = nn.Sequential(nn.Linear(2, 2))
    model._original_forward = model.forward
    model.forward = lambda values: model._original_forward(values) * 2
    plain, values = plain_copy(model), torch.ones(1, 2)
    assert {"forward", "_original_forward"}.isdisjoint(vars(plain))
    torch.testing.assert_close(2 * plain(values), model(values))
