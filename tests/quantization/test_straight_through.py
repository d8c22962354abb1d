"""Rounding in bfloat16, as under autocast, compared with rounding the same numbers in float32."""

from __future__ import annotations

import pytest
import torch

from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.grid import Grid

CASES = [(2, 0.9, 0), (4, 0.17, 5), (8, 0.0117, 0), (8, 0.031, 131)]


def made(bits, step, zero, *, learned=False):
    quantizer = FakeQuantize(Grid.unsigned(bits))
    if learned:
        quantizer.learn_step()
    quantizer.set_grid(torch.tensor(step), torch.tensor(zero))
    return quantizer


def rounded_and_gradient(quantizer, values, gradient):
    values = values.clone().requires_grad_()
    shown = quantizer(values)
    shown.backward(gradient.to(values.dtype))
    return shown.detach(), values.grad


@pytest.mark.parametrize(("bits", "step", "zero"), CASES)
@pytest.mark.parametrize("learned", [False, True])
def test_integers_and_gradients_equal_those_of_float32(learned, bits, step, zero):
    torch.manual_seed(0)
    values, gradient = (2 * torch.randn(4000)).bfloat16(), torch.randn(4000).bfloat16()
    low, precise = made(bits, step, zero, learned=learned), made(bits, step, zero, learned=learned)
    shown, passed = rounded_and_gradient(low, values, gradient)
    expected, expected_passed = rounded_and_gradient(precise, values.float(), gradient)
    assert shown.dtype == passed.dtype == torch.bfloat16
    assert torch.equal(shown, expected.bfloat16())
    assert torch.equal(passed.float(), expected_passed)
    assert 0.1 < (passed == 0).float().mean() < 0.9 or bits == 8
    if learned:
        of_step, expected_of_step = float(low.scale.grad), float(precise.scale.grad)
        assert of_step == pytest.approx(expected_of_step, rel=0.05, abs=0.02)


@pytest.mark.parametrize("learned", [False, True])
def test_all_8_bit_integers_are_distinct_in_bfloat16(learned):
    quantizer = made(8, 1.0, 0, learned=learned)
    integers = torch.arange(256).bfloat16()
    assert torch.equal(quantizer(integers).detach(), integers)
    assert quantizer(torch.tensor([300.0, -3.0]).bfloat16()).tolist() == [255, 0]


def test_the_range_is_updated_from_bfloat16_values():
    quantizer = FakeQuantize(Grid.unsigned(8)).track_activations(0.5).train()
    quantizer.set_range(torch.tensor(0.0), torch.tensor(1.0))
    quantizer(torch.tensor([0.0, 3.0]).bfloat16())
    assert float(quantizer.observer.high) == 2
    assert quantizer.observer.high.dtype == torch.float32


@pytest.mark.parametrize(("bits", "step", "zero"), [*CASES[:2], (8, 0.005, 0), (8, 0.007, 131)])
def test_rounding_equals_the_kernel_of_torch(bits, step, zero):
    torch.manual_seed(1)
    values, gradient = 2 * torch.randn(20_000), torch.randn(20_000)
    shown, passed = rounded_and_gradient(made(bits, step, zero), values, gradient)
    given = values.clone().requires_grad_()
    expected = torch.fake_quantize_per_tensor_affine(given, step, zero, 0, 2**bits - 1)
    expected.backward(gradient)
    assert 0.1 < (passed == 0).float().mean() < 0.9
    off = ((shown - expected.detach()).abs() > step / 2) | (passed != given.grad)
    assert off.sum() <= 2  # it multiplies by 1 / step, which can round differently in the middle of two points
